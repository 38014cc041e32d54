"""Whole chunks of the neural memory, one after the other, by matrix products.

The forward pass keeps its products, but of the memory itself only some chunks' starts; the backward
pass is written out by hand. It walks `InnerGradient`, `carry_chunk` and `read_layers` in reverse; a
name with d in front is the loss's gradient of it.

Three things cost time beside the products, and shape the code. A memory network's layers are wide on
one side: products with a diagonal (gates, decays) are taken on the narrow one. Calls are many: what
does not depend on the memory is done for many chunks at once. And the memories of a batch are one
dimension M = B H, as `bmm` wants them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.backend import current_backend
from everlong.ops.decay import (
    ChunkCoefficients,
    Gates,
    chunk_coefficients,
    coefficients_and_decays,
    coefficients_backward,
)
from everlong.ops.derivatives import first_derivatives_only
from everlong.ops.inner_mlp import InnerGradient, LayerNorm, gelu_backward, memory_output
from everlong.ops.native.scan import scan_native, scan_problem, scan_wins

Tensors = tuple[Tensor, ...]
BLOCK = 4  # chunks whose coefficients are computed at once


class LayerCoefficients(NamedTuple):
    """One layer's coefficients of a chunk, shaped to multiply rows [M, N, .] and states [M, ., .]."""

    memory_carry: Tensor  # [M, N, 1]
    momentum_carry: Tensor | None  # [M, N, 1]
    write: Tensor  # [M, N, C]
    last_memory_carry: Tensor  # [M, 1, 1]   of the chunk's last row: what its end is made of
    last_momentum_carry: Tensor | None  # [M, 1, 1]
    last_write: Tensor  # [M, C, 1]
    final_carry: Tensor | None  # [M, 1, 1]
    final_write: Tensor | None  # [M, C, 1]


def layer_coefficients(
    chunk: ChunkCoefficients, rows: ChunkCoefficients | None = None
) -> list[LayerCoefficients]:
    """A chunk's coefficients, [layers, M, ...] (or [chunks * layers, M, ...]), layer by layer.

    rows: those of the rows to read; all of the chunk's if None.
    """
    rows = rows or chunk

    def column(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unsqueeze(-1)

    def last(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., -1:].unsqueeze(-1)

    views = (
        column(rows.memory_carry),
        column(rows.momentum_carry),
        rows.write,
        last(chunk.memory_carry),
        last(chunk.momentum_carry),
        chunk.write[..., -1, :].unsqueeze(-1),
        None if chunk.final_carry is None else chunk.final_carry[..., None, None],
        column(chunk.final_write),
    )
    each = [None if view is None else view.unbind(0) for view in views]
    count = rows.write.shape[0]

    def layer(i: int) -> Any:
        return (None if x is None else x[i] for x in each)

    return [LayerCoefficients(*layer(i)) for i in range(count)]


class LayerRead(NamedTuple):
    """One layer's read: x W_t; x z^T; x W and x S where that is the narrow side."""

    out: Tensor
    product: Tensor
    through: Tensor | None
    surprise: Tensor | None


def read_layers(
    q: Tensor,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    coefficients: Sequence[LayerCoefficients],
) -> list[LayerRead]:
    """The products of M_t(q_t) without forming M_t; layer by layer

        x W_t = a_t (x W_0) + b_t (x S_0) + ((x z^T) * write[t]) delta

    q: [M, N, K]; weights, momentum: at the chunk's start, [M, in, out]; inputs z and errors delta: of
    the whole chunk, [M, C, .].
    """
    reads: list[LayerRead] = []
    x = q
    for layer, rows in enumerate(coefficients):
        if layer:
            x = F.gelu(reads[-1].out)
        product = torch.bmm(x, inputs[layer].mT)
        out, through = _carried(x, weights[layer], rows.memory_carry)
        surprise = None
        if momentum is not None and rows.momentum_carry is not None:
            surprise = _carried(x, momentum[layer], rows.momentum_carry, out)[1]
        reads.append(
            LayerRead(out.baddbmm_(product * rows.write, errors[layer]), product, through, surprise)
        )
    return reads


def _carried(
    x: Tensor, weight: Tensor, carry: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """diag(carry) x weight, added to `out` where given; and x weight, if that is the narrow side."""
    if x.shape[-1] <= weight.shape[-1]:
        x = x * carry
        return (torch.bmm(x, weight) if out is None else out.baddbmm_(x, weight)), None
    product = torch.bmm(x, weight)
    return (product * carry if out is None else out.addcmul_(product, carry)), product


def _carried_backward(
    x: Tensor,
    weight: Tensor,
    product: Tensor | None,
    carry: Tensor,
    dout: Tensor,
    dx: Tensor,
    dweight: Tensor,
) -> Tensor:
    """Back through `_carried`, with what it gave as product; adds to dx, dweight; returns dcarry."""
    if product is None:
        pulled = torch.bmm(dout, weight.mT)
        dweight.baddbmm_((x * carry).mT, dout)
        dx.addcmul_(pulled, carry)
        return pulled.mul_(x).sum(-1)
    scaled = dout * carry
    dx.baddbmm_(scaled, weight.mT)
    dweight.baddbmm_(x.mT, scaled)
    return (product * dout).sum(-1)


def carry_chunk(
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    coefficients: Sequence[LayerCoefficients],
) -> tuple[list[Tensor], list[Tensor] | None]:
    """M_C and S_C, the state after a full chunk."""
    new_weights: list[Tensor] = []
    new_momentum: list[Tensor] = []
    for layer, now in enumerate(coefficients):
        z, error = inputs[layer], errors[layer]
        new = weights[layer] * now.last_memory_carry
        if momentum is not None and now.last_momentum_carry is not None:
            assert now.final_carry is not None and now.final_write is not None
            new.addcmul_(momentum[layer], now.last_momentum_carry)
            kept = momentum[layer] * now.final_carry
            new_momentum.append(_add_outer_(kept, z, error, now.final_write))
        new_weights.append(_add_outer_(new, z, error, now.last_write))
    return new_weights, new_momentum or None


def _add_outer_(out: Tensor, left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
    """out + left^T diag(diagonal) right, in place. left, right: [M, C, .]; diagonal: [M, C, 1]."""
    if left.shape[-1] <= right.shape[-1]:
        return out.baddbmm_((left * diagonal).mT, right)
    return out.baddbmm_(left.mT, right * diagonal)


def _outer_backward(
    dout: Tensor,
    left: Tensor,
    right: Tensor,
    diagonal: Tensor,
    grads: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through left^T diag(diagonal) right. Returns the gradients of left and right (`grads`,
    added to in place, where given) and of diagonal."""
    flip = left.shape[-1] > right.shape[-1]
    narrow, wide, to_narrow = (right, left, dout) if flip else (left, right, dout.mT)
    pulled = torch.bmm(wide, to_narrow)
    ddiagonal = (narrow * pulled).sum(-1)
    scaled = narrow * diagonal
    if grads is None:
        pair = pulled.mul_(diagonal), torch.bmm(scaled, to_narrow.mT)
    else:
        dnarrow, dwide = reversed(grads) if flip else grads
        pair = dnarrow.addcmul_(pulled, diagonal), dwide.baddbmm_(scaled, to_narrow.mT)
    return (pair[1], pair[0], ddiagonal) if flip else (*pair, ddiagonal)


def scale_of_each(scale: Tensor | None, memories: tuple[int, ...]) -> Tensor | None:
    """LN's scale [H, K] for each of the memories (B, H): [M, 1, K]."""
    return None if scale is None else scale.expand(*memories, -1).flatten(0, 1).unsqueeze(1)


def scan_chunks(
    rows: Tensors,
    gates: Gates,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    chunk_size: int,
    scale: Tensor | None,
) -> tuple[Tensor, Tensors, Tensors | None]:
    """Read and write a whole number of chunks.

    rows: q, k, v as [B, H, T, K], T a multiple of C. gates: theta, log_retain, log_eta as
    [B, H, L, T]. Returns y [B, H, T, K] and the weights and momentum after the last chunk. Raises
    RuntimeError where the native back end is wanted and cannot.
    """
    wanted = "eager" if torch.compiler.is_compiling() else current_backend()
    if wanted == "native" or (wanted == "auto" and scan_wins(rows[0])):
        reason = scan_problem(len(weights), *rows, *gates, *weights, *(momentum or ()), scale)
        if reason is None:
            return scan_native(rows, gates, weights, momentum, chunk_size, scale)
        if wanted == "native":
            raise RuntimeError(f"the native back end cannot scan this: {reason}")
    layers, memories = len(weights), rows[0].shape[:2]
    gates = gates.map(lambda g: g.unflatten(3, (-1, chunk_size)).permute(3, 2, 0, 1, 4).flatten(2, 3))
    state = [x.flatten(0, 1) for x in (*weights, *(momentum or ()))]
    inputs = (*rows, scale_of_each(scale, memories), *gates, *state)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, *final = _chunk_scan(layers, train, *inputs)
    final = [x.unflatten(0, memories) for x in final]
    return y, tuple(final[:layers]), None if momentum is None else tuple(final[layers:])


@torch.compiler.allow_in_graph
def _chunk_scan(layers: int, train: bool, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    return _ChunkScan.apply(layers, train, *inputs)


class _ChunkScan(torch.autograd.Function):
    """See `scan_chunks`; q, k, v, y: [B, H, T, K], gates: [chunks, L, M, C]."""

    @staticmethod
    def forward(ctx: Any, layers: int, train: bool, *inputs: Any) -> Any:
        text, state = _Text.of(inputs, layers)
        chunks = text.chunks
        # States are the largest of all: kept every so many chunks, computed again between.
        interval = min(max(1, math.isqrt(chunks // 2)), BLOCK)
        states: list[Tensor] = []
        products: list[Tensor | None] = []
        y = torch.empty_like(text.q)
        for first in range(0, chunks, BLOCK):
            coefficients = text.coefficients(first)
            for n, now in enumerate(coefficients):
                chunk = _Chunk(text, first + n, state, now)
                text.put(y, first + n, chunk.read())
                if train:
                    states += state.tensors if n % interval == 0 else ()
                    products += chunk.products()
                state = chunk.carry()
        ctx.layers, ctx.interval = layers, interval
        ctx.inputs, ctx.states = len(inputs) - len(state.tensors), len(states)
        ctx.save_for_backward(*inputs[: ctx.inputs], *states, *products)
        return (y, *state.tensors)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor, *dfinal: Tensor) -> Any:
        # The forward pass ran without autocast, so does this, wherever it is called.
        with torch.autocast(dy.device.type, enabled=False):
            return _scan_backward(ctx, dy, dfinal)


def _scan_backward(ctx: Any, dy: Tensor, dfinal: Tensors) -> Any:
    """From the gradients of y and the final state to those of all inputs."""
    saved = ctx.saved_tensors
    text, _ = _Text.of(saved[: ctx.inputs], ctx.layers)
    kept = _Kept(
        states=saved[ctx.inputs :][: ctx.states],
        products=saved[ctx.inputs + ctx.states :],
        interval=ctx.interval,
        layers=ctx.layers,
        each=len(dfinal),
    )
    # Gradients of the state are scaled and added to in place from here on: copies.
    dstate = _State.of([x.clone() for x in dfinal], ctx.layers)
    drows = [torch.empty_like(x) for x in (text.q, text.k, text.v)]
    dgates: list[Gates] = []
    dscale = None if text.scale is None else torch.zeros_like(text.scale)
    for first in reversed(range(0, text.chunks, BLOCK)):
        block = text.block(first)
        coefficients, decays = coefficients_and_decays(block)
        grads: list[LayerCoefficients] = []
        for chunk in kept.last_first(text, first, _by_chunk(coefficients)):
            parts = chunk.backward(text.rows(dy, chunk.index), dstate)
            for whole, part in zip(drows, parts, strict=True):
                text.put(whole, chunk.index, part)
            grads += reversed(chunk.grads)
            if dscale is not None:
                dscale += chunk.dscale.unsqueeze(1)
        total = _stack(grads[::-1], coefficients)
        dgates.append(coefficients_backward(block, decays, coefficients, total))
    gate_grads = [
        None if gate[0] is None else torch.cat(gate[::-1]) for gate in zip(*dgates, strict=True)
    ]
    return (None, None, *drows, dscale, *gate_grads, *dstate.tensors)


class _Kept(NamedTuple):
    """What the forward pass kept: states at every `interval`-th chunk of a block, all products."""

    states: Sequence[Tensor]
    products: Sequence[Tensor | None]
    interval: int
    layers: int
    each: int  # tensors of a state

    def last_first(
        self, text: _Text, first: int, coefficients: list[list[LayerCoefficients]]
    ) -> Iterator[_Chunk]:
        """The chunks of the block that begins at chunk `first`, from the last to the first."""
        starts = range(0, len(coefficients), self.interval)
        before = first // BLOCK * len(range(0, BLOCK, self.interval))
        for at, start in reversed(list(enumerate(starts, before))):
            state = self._state(at)
            group: list[_Chunk] = []
            for n in range(start, min(start + self.interval, len(coefficients))):
                state = group[-1].carry() if group else state
                products = self._products(first + n)
                group.append(_Chunk(text, first + n, state, coefficients[n], products))
            while group:
                yield group.pop()

    def _state(self, at: int) -> _State:
        return _State.of(self.states[at * self.each : (at + 1) * self.each], self.layers)

    def _products(self, index: int) -> Sequence[Tensor | None]:
        each = 4 * self.layers
        return self.products[index * each : (index + 1) * each]


class _State(NamedTuple):
    """Weights and momentum, per layer [M, in, out]."""

    weights: Sequence[Tensor]
    momentum: Sequence[Tensor] | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layers: int) -> _State:
        return cls(tensors[:layers], tensors[layers:] or None)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.weights, *(self.momentum or ())]


class _Text(NamedTuple):
    """What is read, and how."""

    q: Tensor  # [B, H, T, K]
    k: Tensor
    v: Tensor
    scale: Tensor | None  # [M, 1, K]
    gates: Gates  # [chunks, L, M, C]

    @classmethod
    def of(cls, inputs: Sequence[Any], layers: int) -> tuple[_Text, _State]:
        """From the arguments of the autograd function."""
        q, k, v, scale, theta, log_retain, log_eta, *state = inputs
        gates = Gates(theta, log_retain, log_eta)
        return cls(q, k, v, scale, gates), _State.of(state, layers)

    @property
    def chunks(self) -> int:
        """Their number."""
        return len(self.gates.theta)

    def rows(self, x: Tensor, index: int) -> Tensor:
        """A chunk's part of [B, H, T, K] as [M, C, K]."""
        size = self.gates.theta.shape[-1]
        return x.narrow(2, index * size, size).flatten(0, 1)

    def put(self, x: Tensor, index: int, rows: Tensor) -> None:
        """Back: rows [M, C, K] into their part of [B, H, T, K]."""
        size = self.gates.theta.shape[-1]
        x.narrow(2, index * size, size).copy_(rows.unflatten(0, x.shape[:2]))

    def block(self, first: int) -> Gates:
        """The gates of the block of chunks from `first` on."""
        return self.gates.map(lambda gate: gate[first : first + BLOCK])

    def coefficients(self, first: int) -> list[list[LayerCoefficients]]:
        """Those of each chunk and layer of a block."""
        return _by_chunk(chunk_coefficients(self.block(first)))


def _by_chunk(coefficients: ChunkCoefficients) -> list[list[LayerCoefficients]]:
    """Coefficients [chunks, L, M, ...] by chunk, then by layer."""
    layers = coefficients.write.shape[1]
    flat = layer_coefficients(coefficients.map(lambda x: x.flatten(0, 1)))
    return [flat[i : i + layers] for i in range(0, len(flat), layers)]


def _stack(grads: list[LayerCoefficients], like: ChunkCoefficients) -> ChunkCoefficients:
    """Gradients by chunk and layer as those of the block's coefficients [chunks, L, M, ...]."""
    shape = like.write.shape[:2]
    stacked: Any = [
        None if each[0] is None else torch.stack(each).unflatten(0, shape)
        for each in zip(*grads, strict=True)
    ]
    total = LayerCoefficients(*stacked)
    total.memory_carry[..., -1] += total.last_memory_carry
    total.write[..., -1, :] += total.last_write
    if total.momentum_carry is not None and total.last_momentum_carry is not None:
        total.momentum_carry[..., -1] += total.last_momentum_carry
    return ChunkCoefficients(
        total.memory_carry, total.momentum_carry, total.write, total.final_carry, total.final_write
    )


class _Chunk:
    """One chunk, from the state at its start and, where they were kept, its `products`."""

    def __init__(
        self,
        text: _Text,
        index: int,
        state: _State,
        coefficients: list[LayerCoefficients],
        products: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.index, self.scale = index, text.scale
        self.q, k, v = (text.rows(x, index) for x in (text.q, text.k, text.v))
        self.weights, self.momentum = state
        self.coefficients = coefficients
        self.inner = InnerGradient(k, v, self.weights, self.scale)
        self.reads: list[LayerRead] = []
        if products is not None:
            kept: Any = zip(*[iter(products)] * 4, strict=True)
            self.reads = [LayerRead(*each) for each in kept]

    def read(self) -> Tensor:
        """y [M, C, K]."""
        inner = self.inner
        self.reads = read_layers(
            self.q, self.weights, self.momentum, inner.inputs, inner.errors, self.coefficients
        )
        return memory_output(self.q, self.reads[-1].out, self.scale)

    def products(self) -> list[Tensor | None]:
        """What `backward` would have to multiply again, after `read`; four a layer."""
        return [tensor for read in self.reads for tensor in read]

    def carry(self) -> _State:
        """The state after the chunk."""
        inner = self.inner
        return _State(
            *carry_chunk(self.weights, self.momentum, inner.inputs, inner.errors, self.coefficients)
        )

    def backward(self, dy: Tensor, dstate: _State) -> Tensors:
        """From dy [M, C, K] and the gradients of the state after the chunk, which become those of
        the state before it, to those of q, k, v.

        Leaves the gradients of the coefficients, layer by layer, in `grads`, that of the scale, [M,
        K], in `dscale`.
        """
        self.dweights, self.dmomentum = dstate
        self.dinputs: list[Tensor] = []
        self.derrors: list[Tensor] = []
        ends: Any = [self._carry_backward(layer) for layer in range(len(self.weights))]
        dq, rows, dscale = self._read_backward(dy)
        dk, dv, more = self.inner.backward(self.dinputs, self.derrors, self.dweights)
        self.grads = [LayerCoefficients(*row, *end) for row, end in zip(rows, ends, strict=True)]
        if dscale is not None and more is not None:
            self.dscale = dscale.add_(more)
        return dq, dk, dv

    def _carry_backward(self, layer: int) -> tuple[Tensor | None, ...]:
        """Through M_C and S_C of one layer: dinputs, derrors, and dstate scaled by the carries.

        Returns the gradients of the five coefficients of the chunk's end.
        """
        now, weight = self.coefficients[layer], self.weights[layer]
        z, error = self.inner.inputs[layer], self.inner.errors[layer]
        dweight = self.dweights[layer]
        dlast = (dweight * weight).sum((-1, -2))
        dz, derror, dwrite = _outer_backward(dweight, z, error, now.last_write)
        self.dinputs.append(dz)
        self.derrors.append(derror)
        others: tuple[Tensor | None, ...] = (None, dwrite, None, None)
        if self.momentum is not None:
            assert self.dmomentum is not None and now.last_momentum_carry is not None
            assert now.final_carry is not None and now.final_write is not None
            momentum, dmomentum = self.momentum[layer], self.dmomentum[layer]
            dlast_momentum = (dweight * momentum).sum((-1, -2))
            dfinal = (dmomentum * momentum).sum((-1, -2))
            dfinal_write = _outer_backward(dmomentum, z, error, now.final_write, (dz, derror))[2]
            others = (dlast_momentum, dwrite, dfinal, dfinal_write)
            dmomentum.mul_(now.final_carry).addcmul_(dweight, now.last_momentum_carry)
        dweight.mul_(now.last_memory_carry)
        return dlast, *others

    def _read_backward(self, dy: Tensor) -> tuple[Tensor, list[Any], Tensor | None]:
        """Through y_t = M_t(q_t): the gradients of q, of the coefficients, of the scale."""
        dscale, dout = None, dy
        if self.scale is not None:
            norm = LayerNorm(self.reads[-1].out)
            dscale = (dy * norm.normed).sum(-2)
            dout = norm.backward(dy * self.scale)
        grads: list[Any] = []
        for layer in reversed(range(len(self.weights))):
            below = self.reads[layer - 1].out
            dx, *rest = self._read_layer_backward(layer, F.gelu(below) if layer else self.q, dout)
            grads.append(tuple(rest))
            if layer:
                dout = gelu_backward(dx, below)
        return dx if self.scale is None else dx.add_(dy), grads[::-1], dscale

    def _read_layer_backward(
        self, layer: int, x: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Back through one layer's read of x: dx, and the gradients of its three coefficients."""
        now, inner = self.coefficients[layer], self.inner
        _, product, through, surprise = self.reads[layer]
        dproduct = torch.bmm(dout, inner.errors[layer].mT)
        dwrite = product * dproduct
        dproduct.mul_(now.write)
        self.derrors[layer].baddbmm_((product * now.write).mT, dout)
        self.dinputs[layer].baddbmm_(dproduct.mT, x)
        dx = torch.bmm(dproduct, inner.inputs[layer])
        dcarry = _carried_backward(
            x, self.weights[layer], through, now.memory_carry, dout, dx, self.dweights[layer]
        )
        dmomentum = None
        if self.momentum is not None:
            assert self.dmomentum is not None and now.momentum_carry is not None
            weight, dweight = self.momentum[layer], self.dmomentum[layer]
            dmomentum = _carried_backward(x, weight, surprise, now.momentum_carry, dout, dx, dweight)
        return dx, dcarry, dmomentum, dwrite
