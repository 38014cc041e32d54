"""everlong: language models with a memory.

Importing registers the models with the Auto classes of `transformers`, and does nothing else.
"""

from everlong.layers import NeuralMemory
from everlong.models import TitansConfig, TitansForCausalLM, TitansModel
from everlong.ops import NeuralMemoryState

__all__ = [
    "NeuralMemory",
    "NeuralMemoryState",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansModel",
]
__version__ = "0.1.0"
