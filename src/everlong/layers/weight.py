"""Parameters with a start of their own, each in a module of its own.

What moves weights about (offloading, sharding) and what initialises them (`transformers`) goes from
module to module: a parameter that is reached in any other way may be somewhere else, or be forgotten.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Weight(nn.Module):
    """A parameter of no linear map: call it to get it.

    start: a function of `torch.nn.init` that fills it.
    """

    def __init__(self, *shape: int, start: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.start = start
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the start."""
        self.start(self.weight)

    def forward(self) -> Tensor:
        """The parameter."""
        return self.weight


class Gate(nn.Linear):
    """The logits of a gate: a linear map whose bias starts where the gate is `initial`, in (0, 1)."""

    def __init__(self, in_features: int, out_features: int, initial: float) -> None:
        super().__init__(in_features, out_features)
        self.initial = initial
        self.reset_bias()

    def reset_bias(self) -> None:
        """Back to `initial`."""
        nn.init.constant_(self.bias, math.log(self.initial / (1 - self.initial)))
