"""Modules: parameters, projections and gates around the ops."""

from everlong.layers.attention import Attention, AttentionState, SegmentAttention
from everlong.layers.memory_bank import PositionBank, ReleasedBank, SlotBank
from everlong.layers.neural_memory import NeuralMemory
from everlong.layers.norm import RMSNorm
from everlong.layers.weight import Gate, Weight

__all__ = [
    "Attention",
    "AttentionState",
    "Gate",
    "NeuralMemory",
    "PositionBank",
    "RMSNorm",
    "ReleasedBank",
    "SegmentAttention",
    "SlotBank",
    "Weight",
]
