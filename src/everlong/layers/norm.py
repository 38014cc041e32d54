"""Root-mean-square norm that keeps float64."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from everlong.layers.weight import OwnStart
from everlong.ops import rms_norm
from everlong.ops.recompute import recomputed


class RMSNorm(OwnStart):
    """weight * x / rms(x), computed in at least float32, in Llama's order of operations.

    `transformers`' own rounds to float32 whatever it is given; this one is exact in float64.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_parameters(self) -> None:
        """Back to a weight of one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x: [..., size]. Returns the same shape and type; times silu(gate) where there is one."""
        return rms_norm(x, self.weight, self.eps, gate)

    def unkept(self, x: Tensor, gate: Tensor | None = None) -> AbstractContextManager[Tensor]:
        """`forward`, whose output is made again for the gradients of what is done with it inside."""
        y, eps = self(x, gate), self.eps
        if self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self):
            return nullcontext(y)  # who knows what they do, and whether they do it twice

        def again(x: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
            return rms_norm(x, weight, eps, gate)

        return recomputed(again, x, self.weight, gate, output=y)
