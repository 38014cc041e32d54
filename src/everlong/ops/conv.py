"""Causal depthwise short convolution that continues from call to call."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from everlong.ops.arguments import check_lengths, check_rank, check_shape
from everlong.ops.backend import native_takes, refuse_transforms
from everlong.ops.derivatives import first_derivatives_only
from everlong.ops.native.rows import MOST_TAPS
from everlong.ops.native.rows import ConvSilu as NativeConvSilu
from everlong.ops.norm import unit_length


def causal_conv_silu(
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None,
    lengths: Tensor | None = None,
    unit: int | None = None,
    length: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """y_t = silu(sum_j weight[:, j] x_{t-J+1+j}): each channel sees its last J inputs.

    x: [B, T, N]; weight: [N, J]; tail: [B, J-1, N], the inputs before x, or None for zeros;
    lengths: [B], how many of the T inputs are real in each row (default: all). unit: bring each so
    many channels of y to `length` (1: unit length); divides N.
    Returns y [B, T, N] and the tail for the next call. Raises ValueError when shapes do not fit.
    """
    reach = _check(x, weight, tail, lengths, unit)
    tail = x.new_zeros(x.shape[0], reach, x.shape[2]) if tail is None else tail.to(x.dtype)
    if reach < MOST_TAPS and native_takes(x, weight, tail):
        size = unit or _head(x.shape[2])
        y = NativeConvSilu.apply(x, weight, tail, size, None if unit is None else length)
    else:
        refuse_transforms()
        y = _conv_silu(x, weight, tail)
        if unit is not None:
            y = unit_length(y.unflatten(-1, (-1, unit)), length).flatten(-2)
    if lengths is None:
        last = torch.cat([tail, x[:, max(x.shape[1] - reach, 0) :]], 1)
        return y, last[:, last.shape[1] - reach :]
    index = (lengths[:, None] + torch.arange(reach, device="cpu")).to(x.device)
    return y, torch.cat([tail, x], 1).gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _check(
    x: Tensor, weight: Tensor, tail: Tensor | None, lengths: Tensor | None, unit: int | None
) -> int:
    """Refuse what does not fit, before any work. Returns J - 1."""
    check_rank("x", x, "B, T, N")
    check_rank("weight", weight, "N, J")
    batch, tokens, channels = x.shape
    reach = weight.shape[1] - 1
    if reach < 0:
        raise ValueError(f"weight must be [N, J], J at least 1, got {list(weight.shape)}")
    check_shape("weight", weight, "N, J", (channels, reach + 1))
    if tail is not None:
        check_shape("tail", tail, "B, J-1, N", (batch, reach, channels))
    check_lengths(lengths, batch, tokens)
    if unit is not None and (unit < 1 or channels % unit):
        raise ValueError(f"unit must divide the {channels} channels, got {unit}")
    return reach


def _head(channels: int) -> int:
    """Channels of a piece of work where nothing else divides them."""
    return 64 if channels % 64 == 0 else channels


@torch.compiler.allow_in_graph
def _conv_silu(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    return _ConvSilu.apply(x, weight, tail)


class _ConvSilu(torch.autograd.Function):
    """The convolution as a sum of shifted products, in place: no transposes, no padded copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, tail)
        return torch.nn.functional.silu(_convolve(x, weight, tail), inplace=True)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, tail = ctx.saved_tensors
        dy = torch.ops.aten.silu_backward(dout, _convolve(x, weight, tail))
        dx, dtail = torch.zeros_like(x), torch.zeros_like(tail)
        dtaps, product = [], torch.empty_like(x)
        for (tap, (rows, inputs), (early, before)), (_, (_, dinputs), (_, dbefore)) in zip(
            _shifts(weight, dy, x, tail), _shifts(weight, dy, dx, dtail), strict=True
        ):
            dinputs.addcmul_(rows, tap)
            dbefore.addcmul_(early, tap)
            late = torch.mul(rows, inputs, out=product[:, : rows.shape[1]]).sum((0, 1))
            dtaps.append(late + (early * before).sum((0, 1)))
        return dx, torch.stack(dtaps, 1), dtail


def _convolve(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for tap, (rows, inputs), (early, before) in _shifts(weight, y, x, tail):
        rows.addcmul_(inputs, tap)
        early.addcmul_(before, tap)
    return y


def _shifts(
    weight: Tensor, y: Tensor, x: Tensor, tail: Tensor
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Each tap with the rows of y it gives to and those it takes: of x, and of the tail."""
    tokens, reach = y.shape[1], weight.shape[1] - 1
    for j, tap in enumerate(weight.mT.contiguous()):
        back = min(reach - j, tokens)
        yield tap, (y[:, back:], x[:, : tokens - back]), (y[:, :back], tail[:, j : j + back])
