"""Pure functions of tensors: the papers' equations, their fast forms and their states."""

from everlong.ops.backend import backends, current_backend, use_backend
from everlong.ops.conv import causal_conv_silu
from everlong.ops.memory_state import NeuralMemoryState
from everlong.ops.memory_trace import MemoryTrace, trace_neural_memory
from everlong.ops.neural_memory import (
    chunk_neural_memory,
    read_neural_memory,
    recurrent_neural_memory,
)
from everlong.ops.norm import rms_norm, sigmoid_gate, swiglu, unit_length, unit_rms

__all__ = [
    "MemoryTrace",
    "NeuralMemoryState",
    "current_backend",
    "backends",
    "causal_conv_silu",
    "chunk_neural_memory",
    "read_neural_memory",
    "recurrent_neural_memory",
    "rms_norm",
    "sigmoid_gate",
    "swiglu",
    "trace_neural_memory",
    "unit_length",
    "unit_rms",
    "use_backend",
]
