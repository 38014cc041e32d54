"""Parameters with a start of their own, each in a module of its own.

What moves weights about (offloading, sharding) and what initialises them (`transformers`) goes from
module to module: a parameter that is reached in any other way may be somewhere else, or be forgotten.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """A module that is made of others."""

    def reset_parameters(self) -> None:
        """All parameters back to a start."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()


class Started(nn.Module):
    """A module that has a word in its start when `transformers` initialises a model around it."""

    is_started = False

    def finish_start(self) -> None:
        """What is left to do once that model's rules have gone over the module's parts."""
        raise NotImplementedError

    @property
    def _is_hf_initialized(self) -> bool:
        """What `transformers` asks before it applies a model's rules: they are never to be."""
        if not self.is_started:
            self.finish_start()
        self.is_started = True  # of a copy too, whose parameters have lost their marks
        return True

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self.is_started = value


class OwnStart(Started):
    """A module that alone knows how its parameters start: by `reset_parameters`.

    In a model of `transformers` the rules of that model go over every module, zero all biases, and
    leave a parameter that they do not know as it is: where a checkpoint lacks it, memory that nobody
    has filled.
    """

    def reset_parameters(self) -> None:
        """Back to the start."""
        raise NotImplementedError

    @property
    def lacks_start(self) -> bool:
        """Whether `transformers` still has to fill it: no checkpoint has."""
        loaded = (getattr(p, "_is_hf_initialized", False) for p in self.parameters(recurse=False))
        return not (self.is_started or all(loaded))

    def finish_start(self) -> None:
        """All of it, unless a checkpoint has filled it."""
        if self.lacks_start:
            self.reset_parameters()


class Weight(OwnStart):
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


class Gate(OwnStart):
    """The logits of a gate: a linear map whose bias starts where the gate is `initial`, in (0, 1), one
    number or [out_features].

    No `nn.Linear`, whose biases are zeroed by anyone who initialises a model.
    """

    def __init__(self, in_features: int, out_features: int, initial: float | Sequence[float]) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.initial = initial
        self._reset_bias()

    def reset_parameters(self, std: float | None = None) -> None:
        """Back to the start; std: of the weight, None: as that of an `nn.Linear`."""
        if std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=std)
        self._reset_bias()

    def _reset_bias(self) -> None:
        logits = torch.logit(torch.tensor(self.initial, dtype=torch.float64, device="cpu"))
        with torch.no_grad():
            self.bias.copy_(logits)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]. Returns [..., out_features]."""
        return F.linear(x, self.weight, self.bias)
