"""Causal attention over a window by the C library, for autograd."""

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
    room_by_token,
    threads_for,
)

BLOCK = 64  # queries at a time
INPUTS = ("q", "k", "v", "prefix_k", "prefix_v")
MOST_KEYS = 8192  # that a block may see: its scores are there all at once


def attention_wins(k: Tensor, window: int) -> bool:
    """Whether it is faster than torch's: on the way back a thread has all queries of its keys.

    k: [B, M, S, K]; window: keys that a query sees, 0 for all.
    """
    most = min(window + BLOCK, k.shape[2]) if window else k.shape[2]
    return most <= MOST_KEYS and 2 * k.shape[0] * k.shape[1] >= torch.get_num_threads()


class _Attention(ctypes.Structure):
    """`Attention` of attention.c."""

    _fields_ = [
        *integers("batch heads key_heads tokens keys size prefix each window block threads"),
        ("scale", ctypes.c_double),
        *((name, Rows) for name in ("q", "k", "v", "y", "prefix_k", "prefix_v")),
        *pointers("log_sum"),
        *((name, Rows) for name in ("dq", "dk", "dv", "dy", "dprefix_k", "dprefix_v")),
        *pointers("scratch gemm"),
    ]

    @classmethod
    def of(cls, tensors: dict[str, Tensor | None], each: int, window: int) -> "_Attention":
        """Of the fields by their names."""
        q, k, prefix = tensors["q"], tensors["k"], tensors["prefix_k"]
        assert q is not None and k is not None
        seen = 0 if prefix is None else prefix.shape[2]
        sizes = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], seen)
        attention = cls(*sizes, each, window, BLOCK, threads_for(q.numel()), q.shape[3] ** -0.5)
        for name, tensor in tensors.items():
            if tensor is not None:
                setattr(attention, name, Rows.of(tensor))
        return attention

    def run(self, name: str, log_sum: Tensor) -> None:
        """Call the function."""
        native = library(log_sum.dtype)
        size = native.call("everlong_attention_scratch", self)
        self.scratch = native.scratch(self.threads * size).data_ptr()
        self.log_sum, self.gemm = log_sum.data_ptr(), native.gemm
        native.call(name, self)


class CausalAttention(torch.autograd.Function):
    """q: [B, N, T, K]; k, v: [B, M, S, K], the last ones the queries' own; prefix_k, prefix_v:
    [B, M, P, K] or None; each: keys of a token; window: tokens that each sees (0: all before it)."""

    @staticmethod
    def forward(ctx: Any, each: int, window: int, *inputs: Tensor | None) -> Tensor:
        given = [None if x is None else dense(x) for x in inputs]
        q = given[0]
        assert q is not None
        y = room_by_token(q, q.shape)
        log_sum = q.new_empty(q.shape[:3])
        attention = _Attention.of({**dict(zip(INPUTS, given, strict=True)), "y": y}, each, window)
        attention.run("everlong_attention_forward", log_sum)
        ctx.each, ctx.window = each, window
        ctx.save_for_backward(*given, y, log_sum)
        return y

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> Any:
        *given, y, log_sum = ctx.saved_tensors
        dy = dense(dy)
        tensors = dict(zip(INPUTS, given, strict=True))
        grads: dict[str, Tensor | None] = {"dq": room_by_token(dy, dy.shape)}
        for name in INPUTS[1:]:  # blocks add to these
            x = tensors[name]
            grads["d" + name] = None if x is None else room_by_token(x, x.shape).zero_()
        attention = _Attention.of({**tensors, **grads, "y": y, "dy": dy}, ctx.each, ctx.window)
        attention.run("everlong_attention_backward", log_sum)
        return (None, None, *grads.values())
