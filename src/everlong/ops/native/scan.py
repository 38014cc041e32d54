"""`scan_chunks` by the C library, for autograd."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from everlong.ops.decay import Gates
from everlong.ops.derivatives import first_derivatives_only
from everlong.ops.native.library import (
    Library,
    Rows,
    dense,
    integers,
    library,
    pointers,
    problem,
    room_by_token,
    threads_for,
)

Tensors = tuple[Tensor, ...]
MAX_LAYERS = 8  # of chunk_scan.c
MOST_INTERVAL = 512  # chunks
COUNTS = "batch heads tokens size chunk layers parts decay interval train threads scaled"


def scan_native(
    rows: Tensors,
    gates: Gates,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    chunk_size: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensors, Tensors | None]:
    """As `everlong.ops.chunk_scan.scan_chunks`; the caller has seen that there is no problem."""
    layers = len(weights)
    inputs = (*rows, scale, *gates, *weights, *(momentum or ()))
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, *final = _Scan.apply(layers, chunk_size, train, *inputs)
    return y, tuple(final[:layers]), None if momentum is None else tuple(final[layers:])


def scan_problem(layers: int, *inputs: Tensor | None) -> str | None:
    """Why the native scan cannot read these into memories of so many layers, if so."""
    if layers > MAX_LAYERS:
        return f"it does {MAX_LAYERS} layers at most, got {layers}"
    return problem(*inputs)


def scan_wins(q: Tensor) -> bool:
    """Whether it is faster than the eager scan: a thread reads a memory, and some would be idle."""
    threads, memories = torch.get_num_threads(), q.shape[0] * q.shape[1]
    busy = memories / max(-(-memories // threads) * threads, 1)
    # Large products keep all threads busy by themselves.
    return busy >= (0.4 if q.shape[3] <= 128 else 0.75)


class Gate(ctypes.Structure):
    """`Gate` of chunk_scan.c: [B, H, L, T] by address and strides."""

    _fields_ = [*pointers("at"), *integers("batch head layer token")]

    @classmethod
    def of(cls, x: Tensor | None) -> "Gate":
        """Of [B, H, L, T]."""
        return cls() if x is None else cls(x.data_ptr(), *x.stride())


class Shape(ctypes.Structure):
    """`Shape` of chunk_scan.c."""

    _fields_ = [*integers(COUNTS), ("widths", ctypes.c_int64 * (MAX_LAYERS + 1))]

    @classmethod
    def of(cls, inputs: Sequence[Any], layers: int, chunk_size: int) -> "Shape":
        """Of the autograd function's inputs."""
        q = inputs[0]
        shape = cls(*q.shape, chunk_size, layers)
        shape.decay, shape.scaled = inputs[5] is not None, inputs[3] is not None
        shape.parts = 1 if inputs[6] is None else 2
        # What is kept of states and what a group of chunks needs at once grow alike; but the latter
        # is there once, the former for each layer and segment. A group lies on the thread's stack.
        shape.interval = min(max(8, math.isqrt(q.shape[2] // chunk_size * 2)), MOST_INTERVAL)
        shape.threads = threads_for(q.numel())
        shape.widths[: layers + 1] = [q.shape[3], *(w.shape[3] for w in inputs[7 : 7 + layers])]
        return shape


class Arguments(ctypes.Structure):
    """`Tensors` of chunk_scan.c."""

    _fields_ = [
        *((name, Rows) for name in ("q", "k", "v", "y")),
        *((name, Gate) for name in ("theta", "log_retain", "log_eta")),
        *pointers("scale"),
        *((n, Rows * MAX_LAYERS) for n in ("weights", "momentum", "last_weights", "last_momentum")),
        *pointers("states kept"),
        *((name, Rows) for name in ("dq", "dk", "dv", "dy")),
        *((name, Gate) for name in ("dtheta", "dlog_retain", "dlog_eta")),
        *pointers("dscale"),
        *((name, Rows * MAX_LAYERS) for name in ("dweights", "dmomentum")),
        *pointers("scratch gemm"),
    ]

    @classmethod
    def of(cls, inputs: Sequence[Any], layers: int, kept: Sequence[Tensor]) -> "Arguments":
        """Of the autograd function's inputs and what is kept for the way back, if anything."""
        arguments = cls()
        arguments.q, arguments.k, arguments.v = map(Rows.of, inputs[:3])
        arguments.scale = None if inputs[3] is None else inputs[3].data_ptr()
        arguments.theta, arguments.log_retain, arguments.log_eta = map(Gate.of, inputs[4:7])
        arguments.put("", inputs[7:], layers)
        if kept:
            arguments.states, arguments.kept = (x.data_ptr() for x in kept)
        return arguments

    def put(self, before: str, state: Sequence[Tensor], layers: int) -> None:
        """Weights and momentum, [B, H, in, out] each, into the fields named so."""
        for i, x in enumerate(state):
            field = getattr(self, before + ("weights" if i < layers else "momentum"))
            field[i % layers] = Rows.of(x)

    def run(self, native: Library, name: str, shape: Shape) -> None:
        """Call the function."""
        scratch = native.scratch(shape.threads * native.call("everlong_scratch_size", shape))
        self.scratch, self.gemm = scratch.data_ptr(), native.gemm
        native.call(name, shape, self)


class _Scan(torch.autograd.Function):
    """q, k, v: [B, H, T, K]; scale [H, K]; gates [B, H, L, T]; state per layer [B, H, in, out]."""

    @staticmethod
    def forward(ctx: Any, layers: int, chunk_size: int, train: bool, *inputs: Any) -> Any:
        q, k, v, scale, *gates = inputs[:7]
        scale = None if scale is None else scale.contiguous()
        inputs = (*map(dense, (q, k, v)), scale, *gates, *map(dense, inputs[7:]))
        native, shape = library(q.dtype), Shape.of(inputs, layers, chunk_size)
        y = room_by_token(q, q.shape)
        final = [x.new_empty(x.shape) for x in inputs[7:]]
        kept = _room(native, shape) if train else ()
        shape.train = train
        arguments = Arguments.of(inputs, layers, kept)
        arguments.y = Rows.of(y)
        arguments.put("last_", final, layers)
        arguments.run(native, "everlong_scan_forward", shape)
        ctx.layers, ctx.chunk_size = layers, chunk_size
        ctx.save_for_backward(*inputs, *kept)
        return (y, *final)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor, *dfinal: Tensor) -> Any:
        *inputs, states, kept = ctx.saved_tensors
        q, scale, gates = inputs[0], inputs[3], inputs[4:7]
        dy = dense(dy)
        drows = [room_by_token(x, x.shape) for x in inputs[:3]]
        dscale = q.new_zeros(*q.shape[:2], q.shape[3])
        dgates = [None if x is None else x.new_empty(x.shape) for x in gates]
        dstate = [x.clone(memory_format=torch.contiguous_format) for x in dfinal]
        arguments = Arguments.of(inputs, ctx.layers, (states, kept))
        arguments.dy = Rows.of(dy)
        arguments.dq, arguments.dk, arguments.dv = map(Rows.of, drows)
        arguments.dtheta, arguments.dlog_retain, arguments.dlog_eta = map(Gate.of, dgates)
        arguments.dscale = dscale.data_ptr()
        arguments.put("d", dstate, ctx.layers)
        shape = Shape.of(inputs, ctx.layers, ctx.chunk_size)
        arguments.run(library(q.dtype), "everlong_scan_backward", shape)
        return (None, None, None, *drows, None if scale is None else dscale.sum(0), *dgates, *dstate)


def _room(native: Library, shape: Shape) -> Tensors:
    """For what the way back wants kept: states [M, groups - 1, .] and products [M, chunks, .]."""
    memories, chunks = shape.batch * shape.heads, shape.tokens // shape.chunk
    sizes = [native.call(f"everlong_{name}_size", shape) for name in ("state", "kept")]
    counts = -(-chunks // shape.interval) - 1, chunks
    return tuple(
        torch.empty(memories, count, size, dtype=native.dtype, device="cpu")
        for count, size in zip(counts, sizes, strict=True)
    )


READ_ROWS = 64  # tokens at a time


def read_native(q: Tensor, weights: Sequence[Tensor], scale: Tensor | None) -> Tensor:
    """y = M(q) at given weights, q [B, H, T, K]; keeps its inputs alone for the way back."""
    return _Read.apply(len(weights), q, scale, *weights)


class _Read(torch.autograd.Function):
    """As `read_native`."""

    @staticmethod
    def forward(ctx: Any, layers: int, q: Tensor, scale: Tensor | None, *weights: Tensor) -> Tensor:
        scale = None if scale is None else scale.contiguous()
        q, weights = dense(q), tuple(map(dense, weights))
        y = room_by_token(q, q.shape)
        shape, arguments = _reading(layers, q, scale, weights)
        arguments.y = Rows.of(y)
        arguments.run(library(q.dtype), "everlong_read_forward", shape)
        ctx.layers = layers
        ctx.save_for_backward(q, scale, *weights)
        return y

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, scale, *weights = ctx.saved_tensors
        dy, dq = dense(dy), room_by_token(q, q.shape)
        dweights = [w.new_zeros(w.shape) for w in weights]
        dscale = q.new_zeros(*q.shape[:2], q.shape[3])
        shape, arguments = _reading(ctx.layers, q, scale, weights)
        arguments.dy, arguments.dq, arguments.dscale = Rows.of(dy), Rows.of(dq), dscale.data_ptr()
        arguments.put("d", dweights, ctx.layers)
        arguments.run(library(q.dtype), "everlong_read_backward", shape)
        return (None, dq, None if scale is None else dscale.sum(0), *dweights)


def _reading(
    layers: int, q: Tensor, scale: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Shape, Arguments]:
    """What a reading is told: rows that are of no use to it stand for k and v."""
    inputs = (q, q, q, scale, q.new_empty(1, 1, 1, 1), None, None, *weights)
    shape = Shape.of(inputs, layers, READ_ROWS)
    shape.interval = 1
    return shape, Arguments.of(inputs, layers, ())
