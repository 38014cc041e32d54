"""Outputs that are made again on the way back instead of being kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@contextmanager
def recomputed(function: Callable[..., Any], *inputs: Tensor | None) -> Iterator[Any]:
    """function(*inputs): y, or a tuple that begins with y, which what is called inside does not keep
    for its gradients.

    For cheap functions that keep their inputs anyway: y is made of them once more when a gradient asks
    for it, and held until the last has. Where others have plans for what is kept (gradient
    checkpointing has), they go first.
    """
    output = function(*inputs)
    y = _first(output)
    if torch.compiler.is_compiling() or not y.requires_grad:  # compilers plan for themselves
        yield output
        return
    above = torch._C._autograd._top_saved_tensors_default_hooks(True)
    outer = None if above is None else getattr(above[0], "__self__", None)
    if above is not None and not isinstance(outer, _Recomputation):
        yield output
        return
    again = [None if x is None else _Kept(x) for x in inputs]
    made = _Recomputation(function, again, y.data_ptr(), y.numel(), outer)
    with torch.autograd.graph.saved_tensors_hooks(made.pack, made.unpack):
        yield output


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class _Kept:
    """A tensor as autograd keeps one: apart from its graph, or it would be kept for ever by a node that
    keeps its own output; and refused when it was changed since."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x.detach(), x._version

    def get(self) -> Tensor:
        """The tensor."""
        if self.x._version != self.version:
            raise RuntimeError(
                f"a tensor {list(self.x.shape)} that is needed for gradients has been modified by an "
                "inplace operation since it was kept"
            )
        return self.x


@dataclass(eq=False)
class _Recomputation:
    """Lives as long as what is packed inside, and so must not hold y."""

    function: Callable[..., Any]
    inputs: list[_Kept | None]
    place: int
    size: int
    outer: "_Recomputation | None"
    packed: int = 0
    unpacked: int = 0
    again: Tensor | None = None

    def pack(self, x: Tensor) -> Any:
        """What is kept of x: how it lies in y, if it does, whole."""
        if x.data_ptr() == self.place and x.numel() == self.size:
            self.packed += 1
            return self, x.shape, x.stride()
        return _Kept(x) if self.outer is None else self.outer.pack(x)

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        """x of what was kept of it."""
        if isinstance(kept, _Kept):
            return kept.get()
        made, shape, stride = kept
        return made.make().as_strided(shape, stride)

    def make(self) -> Tensor:
        """y, for one of those that ask for it."""
        if self.again is None:
            with torch.no_grad():
                given = [None if x is None else x.get() for x in self.inputs]
                self.again = _first(self.function(*given))
        y, self.unpacked = self.again, self.unpacked + 1
        if self.unpacked % self.packed == 0:
            self.again = None
        return y
