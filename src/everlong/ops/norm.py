"""Rows rescaled to unit length or unit root mean square, and rows that gate each other."""

from typing import Any

import torch
from torch import Tensor

from everlong.ops.arguments import check_rows, check_shape
from everlong.ops.backend import native_takes, refuse_transforms
from everlong.ops.derivatives import first_derivatives_only
from everlong.ops.native.rows import GatedNorm, GateProduct

UNIT_EPS = 1e-6


def unit_length(x: Tensor, length: float = 1.0) -> Tensor:
    """length x / |x| over the last dimension, computed in at least float32, safe at zero.

    Raises ValueError where x has no last dimension, an empty one, or no floating-point numbers.
    """
    check_rows("x", x)
    share = length**-2
    return _rescaled(x, share, UNIT_EPS * share)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, computed in at least float32.

    Raises ValueError as `unit_length` does.
    """
    return _rescaled(x, 1 / check_rows("x", x), eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """weight * x / rms(x), and times silu(gate) where there is one, in Llama's order of operations.

    x, gate: [..., N]; weight: [N]. Raises ValueError when shapes do not fit.
    """
    check_shape("weight", weight, "N", (check_rows("x", x),))
    if gate is not None:
        check_shape("gate", gate, "..., N", x.shape)
    if native_takes(x, weight, gate):
        return GatedNorm.apply(x, gate, weight, eps)
    y = weight * unit_rms(x, eps)
    return y if gate is None else y * torch.nn.functional.silu(gate)


def swiglu(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x, of one shape. Raises ValueError for two."""
    check_shape("gate", gate, "...", x.shape)
    if native_takes(gate, x):
        return GateProduct.apply(gate, x, False)
    return torch.nn.functional.silu(gate) * x


def sigmoid_gate(gate: Tensor, x: Tensor) -> Tensor:
    """sigmoid(gate) * x, of one shape. Raises ValueError for two."""
    check_shape("gate", gate, "...", x.shape)
    if native_takes(gate, x):
        return GateProduct.apply(gate, x, True)
    return x * torch.sigmoid(gate)


def _rescaled(x: Tensor, share: float, eps: float) -> Tensor:
    refuse_transforms()
    wide = torch.promote_types(x.dtype, torch.float32)
    return _Rescaled.apply(x.to(wide), share, eps).to(x.dtype)


class _Rescaled(torch.autograd.Function):
    """y = x r with r = (c |x|^2 + eps)^-1/2; dx = r (dy - c y <y, dy>). Keeps y and r alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, eps: float) -> Tensor:
        inverse = (x.square().sum(-1, keepdim=True) * share + eps).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        ctx.share = share
        return y

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        y, inverse = ctx.saved_tensors
        along = (y * dy).sum(-1, keepdim=True)
        return torch.addcmul(dy, y, along, value=-ctx.share).mul_(inverse), None, None
