"""Modules: parameters, projections and gates around the ops."""

from everlong.layers.attention import Attention, AttentionState, SegmentAttention
from everlong.layers.neural_memory import NeuralMemory
from everlong.layers.norm import RMSNorm

__all__ = ["Attention", "AttentionState", "NeuralMemory", "RMSNorm", "SegmentAttention"]
