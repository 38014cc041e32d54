"""`scan_chunks` by the C library, for autograd."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from everlong.ops.decay import Gates
from everlong.ops.derivatives import first_derivatives_only
from everlong.ops.native.library import MAX_LAYERS, Arguments, Gate, Library, Rows, Shape, load

Tensors = tuple[Tensor, ...]


def scan_native(
    rows: Tensors,
    gates: Gates,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    chunk_size: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensors, Tensors | None]:
    """As `everlong.ops.chunk_scan.scan_chunks`; the caller has seen that there is no `problem`."""
    layers = len(weights)
    inputs = (*rows, scale, *gates, *weights, *(momentum or ()))
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, *final = _Scan.apply(layers, chunk_size, train, *inputs)
    return y, tuple(final[:layers]), None if momentum is None else tuple(final[layers:])


def problem(q: Tensor, layers: int) -> str | None:
    """Why the native scan cannot read q [B, H, T, K] into memories of so many layers, if so."""
    if type(q) is not Tensor or q.device.type != "cpu" or torch.compiler.is_compiling():
        return f"it reads plain tensors on the CPU, outside torch.compile, got {type(q)} on {q.device}"
    if layers > MAX_LAYERS:
        return f"it does {MAX_LAYERS} layers at most, got {layers}"
    library = load(q.dtype)
    return str(library) if isinstance(library, OSError) else None


def wins(q: Tensor) -> bool:
    """Whether it is faster than the eager scan: a thread reads a memory, and some would be idle."""
    threads, memories = torch.get_num_threads(), q.shape[0] * q.shape[1]
    busy = memories / (-(-memories // threads) * threads)
    # Large products keep all threads busy by themselves.
    return busy >= (0.4 if q.shape[3] <= 128 else 0.75)


class _Scan(torch.autograd.Function):
    """q, k, v: [B, H, T, K]; scale [H, K]; gates [B, H, L, T]; state per layer [B, H, in, out]."""

    @staticmethod
    def forward(ctx: Any, layers: int, chunk_size: int, train: bool, *inputs: Any) -> Any:
        rows, (scale, *gates) = map(_dense, inputs[:3]), inputs[3:7]
        scale = None if scale is None else scale.contiguous()
        inputs = (*rows, scale, *gates, *map(_dense, inputs[7:]))
        q, state = inputs[0], inputs[7:]
        shape = _shape(q, state[:layers], chunk_size, inputs)
        library = load(q.dtype)
        assert isinstance(library, Library)
        shape.train = train
        y = torch.empty_like(q)
        final = [x.new_empty(x.shape) for x in state]
        states, kept = library.room(shape)
        arguments = _arguments(inputs, layers, states, kept)
        arguments.y = Rows.of(y)
        arguments.put("last_", final, layers)
        library.run("forward", shape, arguments)
        ctx.layers, ctx.chunk_size = layers, chunk_size
        ctx.save_for_backward(*inputs, states, kept)
        return (y, *final)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor, *dfinal: Tensor) -> Any:
        *inputs, states, kept = ctx.saved_tensors
        q, layers = inputs[0], ctx.layers
        shape = _shape(q, inputs[7 : 7 + layers], ctx.chunk_size, inputs)
        library = load(q.dtype)
        assert isinstance(library, Library)
        drows = [torch.empty_like(x) for x in inputs[:3]]
        dscale = q.new_zeros(*q.shape[:2], q.shape[3])
        dgates = [
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in inputs[4:7]
        ]
        dstate = [x.clone(memory_format=torch.contiguous_format) for x in dfinal]
        arguments = _arguments(inputs, layers, states, kept)
        arguments.dy = Rows.of(dy := _dense(dy))
        arguments.dq, arguments.dk, arguments.dv = map(Rows.of, drows)
        arguments.dtheta, arguments.dlog_retain, arguments.dlog_eta = map(Gate.of, dgates)
        arguments.dscale = dscale.data_ptr()
        arguments.put("d", dstate, layers)
        library.run("backward", shape, arguments)
        dscale = dscale.sum(0) if inputs[3] is not None else None
        return (None, None, None, *drows, dscale, *dgates, *dstate)


def _dense(x: Tensor) -> Tensor:
    """With the last dimension in one piece."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _shape(
    q: Tensor, weights: Sequence[Tensor], chunk_size: int, inputs: Sequence[Tensor | None]
) -> Shape:
    batch, heads, tokens, size = q.shape
    shape = Shape(batch, heads, tokens, size, chunk_size, len(weights))
    shape.parts = 1 if inputs[6] is None else 2
    shape.decay, shape.scaled = inputs[5] is not None, inputs[3] is not None
    # What is kept of states and what a group of chunks needs at once grow alike.
    shape.interval = max(1, math.isqrt(tokens // chunk_size // 2))
    shape.threads = torch.get_num_threads()
    shape.widths[: len(weights) + 1] = [size, *(w.shape[3] for w in weights)]
    return shape


def _arguments(inputs: Sequence[Any], layers: int, states: Tensor, kept: Tensor) -> Arguments:
    arguments = Arguments()
    arguments.q, arguments.k, arguments.v = map(Rows.of, inputs[:3])
    if inputs[3] is not None:
        arguments.scale = inputs[3].data_ptr()
    arguments.theta, arguments.log_retain, arguments.log_eta = map(Gate.of, inputs[4:7])
    arguments.put("", inputs[7:], layers)
    arguments.states, arguments.kept = states.data_ptr(), kept.data_ptr()
    return arguments
