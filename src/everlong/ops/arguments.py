"""What the operations take. Each looks here before it chooses a back end, so that all back ends refuse
the same arguments, and the C code, which believes what it is told, is never given what does not fit.

Shapes are compared and nothing else: no work on tensors, no wait for a device, no break in a graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_rank(name: str, x: Tensor, dims: str) -> None:
    """Refuse x unless it holds floating-point numbers in these dimensions ("B, T, H, K")."""
    if x.dim() != dims.count(",") + 1 or not x.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers [{dims}], got {_described(x)}")


def check_shape(name: str, x: Tensor, dims: str, shape: Sequence[int]) -> None:
    """Refuse x unless it holds floating-point numbers in this shape, called `dims`."""
    if x.shape != shape or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point numbers [{dims}] = {list(shape)}, got {_described(x)}"
        )


def check_rows(name: str, x: Tensor) -> int:
    """The size N of rows [..., N]; refuses x unless it has some, of floating-point numbers."""
    size = x.shape[-1] if x.dim() else 0
    if not size or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point numbers [..., N], N at least 1, got {_described(x)}"
        )
    return size


def check_one_kind(**tensors: Tensor) -> None:
    """Refuse tensors of more than one type or on more than one device."""
    first, *others = tensors.values()
    for x in others:
        if x.dtype != first.dtype or x.device != first.device:
            got = {name: f"{x.dtype} on {x.device}" for name, x in tensors.items()}
            raise ValueError(f"{', '.join(tensors)} must be of one type and on one device, got {got}")


def check_memory(weights: Sequence[Tensor], batch: int, heads: int, size: int) -> None:
    """Refuse a memory network's weights, [B, H, in, out] each, unless each layer takes what the one
    before it gives, and all of them together lead from K numbers to K."""
    width = size
    for w in weights:
        alike = w.dtype == weights[0].dtype and w.device == weights[0].device
        fits = w.dim() == 4 and w.shape[:3] == (batch, heads, width) and w.is_floating_point()
        width = w.shape[3] if fits and alike else -1
    if not weights or width != size:
        raise ValueError(
            f"weights must be [B, H, in, out] = [{batch}, {heads}, in, out], from in = K = {size} over "
            "each layer's out, the next one's in, to out = K, of one floating-point type and on one "
            f"device; got {', '.join(map(_described, weights)) or 'none'}"
        )


def check_lengths(lengths: Tensor | None, batch: int, tokens: int) -> None:
    """Refuse what cannot be how many of its `tokens` are real in each row; None: all."""
    if lengths is not None and (
        not isinstance(lengths, Tensor)
        or lengths.dtype not in INTEGERS
        or lengths.device.type != "cpu"
        or lengths.shape != (batch,)
        or bool(((lengths.long() < 0) | (lengths.long() > tokens)).any())
    ):
        raise ValueError(
            f"lengths must be a tensor of integers on the CPU, [B] = [{batch}], in 0 ... {tokens}, got "
            f"{lengths}"
        )


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
