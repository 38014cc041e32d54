"""Outputs that are made again on the way back instead of being kept."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everlong.ops.backend import current_backend, use_backend


@contextmanager
def recomputed(
    function: Callable[..., Any], *inputs: Tensor | None, output: Any = None
) -> Iterator[Any]:
    """function(*inputs): y, or a tuple that begins with y, which what is called inside does not keep
    for its gradients.

    For cheap functions of their inputs alone that keep these anyway: y is made of them once more when a
    gradient asks for it, and held until the last has. output: what the function gives, if it has been
    asked already. Where others have plans for what is kept (gradient checkpointing has), they go first.
    """
    output = function(*inputs) if output is None else output
    y = _first(output)
    if torch.compiler.is_compiling() or not y.requires_grad or not y.data_ptr():
        yield output  # compilers plan for themselves
        return
    above = torch._C._autograd._top_saved_tensors_default_hooks(True)
    outer = None if above is None else getattr(above[0], "__self__", None)
    foreign = above is not None and not isinstance(outer, _Recomputation)
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    if foreign or not enabled or _inference(inputs):
        yield output
        return
    keep = _Kept if outer is None else outer.pack
    again = [None if x is None else keep(x) for x in inputs]
    shape = (y.data_ptr(), y.dtype, tuple(y.shape), y.stride())
    made = _Recomputation(function, again, current_backend(), *shape, outer)
    with torch.autograd.graph.saved_tensors_hooks(made.pack, made.unpack):
        yield output


def _inference(inputs: Sequence[Tensor | None]) -> bool:
    """Tensors that autograd will refuse to keep, with its own words."""
    return any(x is not None and x.is_inference() for x in inputs)


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
    inputs: list[Any]
    backend: str
    place: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    outer: "_Recomputation | None"
    packed: int = 0
    unpacked: int = 0
    again: Tensor | None = None

    def __post_init__(self) -> None:
        self.span, self.numbers = _span(self.shape, self.stride), math.prod(self.shape)

    def pack(self, x: Tensor) -> Any:
        """What is kept of x: how it lies in y, if it does."""
        offset, odd = divmod(x.data_ptr() - self.place, x.element_size())
        if 0 <= offset < self.span and not odd and self._holds(x, offset):
            self.packed += 1
            return self, x.shape, x.stride(), offset
        return _Kept(x) if self.outer is None else self.outer.pack(x)

    def _holds(self, x: Tensor, offset: int) -> bool:
        """Whether x, which begins at a number of y, is of its numbers alone."""
        # Between the numbers of one that has gaps may be those of others.
        own = self.span == self.numbers or x.numel() == self.numbers
        return x.dtype == self.dtype and own and offset <= self.span - _span(x.shape, x.stride())

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        """x of what was kept of it."""
        if isinstance(kept, _Kept):
            return kept.get()
        made, shape, stride, offset = kept
        y = made.make()
        return y.as_strided(shape, stride, y.storage_offset() + offset)

    def make(self) -> Tensor:
        """y as it lay in memory, for one of those that ask for it."""
        if self.again is None:
            with torch.no_grad(), use_backend(self.backend):
                inputs = [None if x is None else self.unpack(x) for x in self.inputs]
                y = _first(self.function(*inputs))
                if y.stride() != self.stride:
                    y = torch.empty_strided(
                        self.shape, self.stride, dtype=y.dtype, device=y.device
                    ).copy_(y)
                self.again = y
        y, self.unpacked = self.again, self.unpacked + 1
        if self.unpacked % self.packed == 0:
            self.again = None
        return y


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Numbers from the first to the last of a tensor laid out so."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
