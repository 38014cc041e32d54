"""The convolution and the norms of ../conv.py and ../norm.py by the C library, for autograd."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from everlong.ops.derivatives import first_derivatives_only
from everlong.ops.native.library import (
    Rows,
    dense,
    integers,
    library,
    pointers,
    room,
    room_by_token,
    threads_for,
)

MOST_TAPS = 256  # their places lie on a thread's stack


class _Conv(ctypes.Structure):
    """`Conv` of rows.c."""

    _fields_ = [
        *integers("batch tokens width taps size unit threads parts"),
        ("length", ctypes.c_double),
        *((name, Rows) for name in ("x", "y", "dx", "dy")),
        *pointers("weight tail dweight dtail"),
    ]

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, tail: Tensor, size: int, length: float | None) -> "_Conv":
        """For x [B, T, N], weight [J, N] and tail [B, J-1, N]."""
        threads = threads_for(x.numel())
        parts = max(1, min(threads, -(-x.shape[1] // 64)))
        unit = length is not None
        conv = cls(*x.shape, len(weight), size, unit, threads, parts, length or 1.0)
        conv.x = Rows.of(x.unsqueeze(1))
        conv.weight, conv.tail = weight.data_ptr(), tail.data_ptr()
        return conv


class ConvSilu(torch.autograd.Function):
    """silu(conv(x)), and each `size` of its channels at a length, where one is given.

    x: [B, T, N], N a multiple of size; weight [N, J]; tail [B, J-1, N]. Keeps its inputs alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, tail: Tensor, size: int, length: float | None
    ) -> Tensor:
        x, weight, tail = dense(x), weight.mT.contiguous(), tail.contiguous()
        y = room(x, x.shape)
        conv = _Conv.of(x, weight, tail, size, length)
        conv.y = Rows.of(y.unsqueeze(1))
        library(x.dtype).call("everlong_conv_forward", conv)
        ctx.save_for_backward(x, weight, tail)
        ctx.size, ctx.length = size, length
        return y

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, tail = ctx.saved_tensors
        dy, dx, dtail = dense(dy), room(x, x.shape), torch.empty_like(tail)
        conv = _Conv.of(x, weight, tail, ctx.size, ctx.length)
        dweight = x.new_empty(x.shape[0] * conv.parts, *weight.shape)
        conv.dx, conv.dy = Rows.of(dx.unsqueeze(1)), Rows.of(dy.unsqueeze(1))
        conv.dweight, conv.dtail = dweight.data_ptr(), dtail.data_ptr()
        library(x.dtype).call("everlong_conv_backward", conv)
        return dx, dweight.sum(0).mT, dtail, None, None


class _Norm(ctypes.Structure):
    """`Norm` of rows.c."""

    _fields_ = [
        *integers("rows size threads"),
        ("eps", ctypes.c_double),
        *pointers("x gate weight dy y dx dgate dweight"),
    ]

    @classmethod
    def of(cls, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> "_Norm":
        """For x [..., N], gate as many numbers."""
        size = x.shape[-1]
        norm = cls(x.numel() // size, size, threads_for(x.numel()), eps, x.data_ptr())
        norm.gate = None if gate is None else gate.data_ptr()
        norm.weight = weight.data_ptr()
        return norm


class GatedNorm(torch.autograd.Function):
    """weight x / rms(x), times silu(gate) where there is a gate. x: [..., N], gate: as many numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        gate = None if gate is None else gate.contiguous()
        y = room(x, x.shape)
        norm = _Norm.of(x, gate, weight, eps)
        norm.y = y.data_ptr()
        library(x.dtype).call("everlong_norm_forward", norm)
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gate, weight = ctx.saved_tensors
        dy, dx = dy.contiguous(), room(x, x.shape)
        dgate = None if gate is None else room(x, gate.shape)
        norm = _Norm.of(x, gate, weight, ctx.eps)
        dweight = x.new_empty(norm.threads, len(weight))
        norm.dy, norm.dx, norm.dweight = dy.data_ptr(), dx.data_ptr(), dweight.data_ptr()
        norm.dgate = None if dgate is None else dgate.data_ptr()
        library(x.dtype).call("everlong_norm_backward", norm)
        return dx, dgate, dweight.sum(0), None


class _Rotation(ctypes.Structure):
    """`Rotation` of rows.c."""

    _fields_ = [
        *integers("batch heads tokens size threads table_batch"),
        *((name, Rows) for name in ("x", "y")),
        *pointers("cos sin"),
    ]


class Rotate(torch.autograd.Function):
    """Rotary position embedding of x [B, N, T, K] by tables cos, sin [B or 1, 1, T, K / 2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(dense(x), cos, sin)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(dense(dy), cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = room_by_token(x, x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    rotation = _Rotation(*x.shape, threads_for(x.numel()), cos[0].numel() if len(cos) > 1 else 0)
    rotation.x, rotation.y = Rows.of(x), Rows.of(y)
    rotation.cos, rotation.sin = cos.data_ptr(), sin.data_ptr()
    library(x.dtype).call("everlong_rotate", rotation)
    return y


class _Product(ctypes.Structure):
    """`Product` of rows.c."""

    _fields_ = [*integers("count plain threads"), *pointers("gate x dy y dgate dx")]

    @classmethod
    def of(cls, gate: Tensor, x: Tensor, plain: bool) -> "_Product":
        """For two dense tensors."""
        return cls(x.numel(), plain, threads_for(x.numel()), gate.data_ptr(), x.data_ptr())


class GateProduct(torch.autograd.Function):
    """silu(gate) x, or (plain) sigmoid(gate) x, keeping these two alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor, plain: bool) -> Tensor:
        gate, x = gate.contiguous(), x.contiguous()
        y = room(x, x.shape)
        product = _Product.of(gate, x, plain)
        product.y = y.data_ptr()
        library(x.dtype).call("everlong_product_forward", product)
        ctx.save_for_backward(gate, x)
        ctx.plain = plain
        return y

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, x = ctx.saved_tensors
        dy, dgate, dx = dy.contiguous(), room(x, x.shape), room(x, x.shape)
        product = _Product.of(gate, x, ctx.plain)
        product.dy, product.dgate, product.dx = dy.data_ptr(), dgate.data_ptr(), dx.data_ptr()
        library(x.dtype).call("everlong_product_backward", product)
        return dgate, dx, None
