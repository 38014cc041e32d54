"""everlong: language models with a memory.

Importing registers the models with the Auto classes of `transformers`, and does nothing else.
"""

from everlong.layers import NeuralMemory
from everlong.models import (
    LM2Config,
    LM2ForCausalLM,
    LM2Model,
    RMTConfig,
    RMTForCausalLM,
    RMTModel,
    TitansConfig,
    TitansForCausalLM,
    TitansModel,
)
from everlong.ops import NeuralMemoryState

__all__ = [
    "LM2Config",
    "LM2ForCausalLM",
    "LM2Model",
    "NeuralMemory",
    "NeuralMemoryState",
    "RMTConfig",
    "RMTForCausalLM",
    "RMTModel",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansModel",
]
__version__ = "0.1.0"
