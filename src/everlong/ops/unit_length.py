"""Rows of unit length."""

from typing import Any

import torch
from torch import Tensor

EPS = 1e-6


def unit_length(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, computed in at least float32, safe at zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return _UnitLength.apply(x.to(wide)).to(x.dtype)


class _UnitLength(torch.autograd.Function):
    """y = x r with r = (|x|^2 + eps)^-1/2; dx = r (dy - y <y, dy>)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        along = (y * dy).sum(-1, keepdim=True)
        return torch.addcmul(dy, y, along, value=-1).mul_(inverse)
