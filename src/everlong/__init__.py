"""everlong: language models with a memory.

Importing registers the models with the Auto classes of `transformers`, and does nothing else.
"""

import sys

try:
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
except KeyboardInterrupt:
    # The seconds in which PyTorch is loaded: the command is not running yet, and cannot say so itself.
    script = "".join(sys.argv[:1])
    if "-m everlong" not in " ".join(sys.orig_argv) and not script.endswith(
        ("everlong", "everlong.exe")
    ):
        raise
    sys.exit(130)

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
