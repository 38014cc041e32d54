"""Whole chunks of the neural memory, one after the other, by matrix products.

The forward pass keeps nothing but the memory at some chunks' starts; the backward pass is written
out by hand and computes the rest again. Backward walks `read_rows`, `carry_chunk` and
`InnerGradient` in reverse; a name with d in front is the loss's gradient of it.

A memory network's layers are wide on one side. Products with a diagonal (gates, decays) are taken
on the narrow side, since passes over the wide one cost as much as matrix products.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.decay import (
    ChunkCoefficients,
    Gates,
    coefficients_and_decays,
    coefficients_backward,
)
from everlong.ops.inner_mlp import (
    InnerGradient,
    gelu_backward,
    memory_output,
    normalise,
    normalise_backward,
)

Tensors = tuple[Tensor, ...]


class LayerRead(NamedTuple):
    """One layer's read: x W_t; x W and x S where that is the narrow side; x z^T."""

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
    rows: ChunkCoefficients,
) -> list[LayerRead]:
    """The products of M_t(q_t) without forming M_t; layer by layer

        x W_t = a_t (x W_0) + b_t (x S_0) + ((x z^T) * write[t]) delta

    q: [B, H, N, K]; weights, momentum: at the chunk's start; inputs z and errors delta: of the
    whole chunk, [B, H, C, .]; rows: the coefficients of q's tokens, layers first.
    """
    x, reads = q, list[LayerRead]()
    for layer, weight in enumerate(weights):
        if layer:
            x = F.gelu(reads[-1].out)
        product = x @ inputs[layer].mT
        out, through = _carried(x, weight, rows.memory_carry[layer])
        surprise = None
        if momentum is not None and rows.momentum_carry is not None:
            surprise = _carried(x, momentum[layer], rows.momentum_carry[layer], out)[1]
        _add_product(out, product * rows.write[layer], errors[layer])
        reads.append(LayerRead(out, product, through, surprise))
    return reads


def _carried(
    x: Tensor, weight: Tensor, carry: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """diag(carry) x weight, added to `out` where given; and x weight, if that is the narrow side."""
    column = carry.unsqueeze(-1)
    if x.shape[-1] <= weight.shape[-1]:
        x = x * column
        return (x @ weight if out is None else _add_product(out, x, weight)), None
    product = x @ weight
    return (product * column if out is None else out.addcmul_(product, column)), product


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out + left @ right, in place: a fresh state for each chunk would cost more than its product."""
    flat = out.flatten(0, -3)
    flat.baddbmm_(left.flatten(0, -3), right.flatten(0, -3))
    return out


def carry_chunk(
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    coefficients: ChunkCoefficients,
) -> tuple[Tensors, Tensors | None]:
    """M_C and S_C, the state after a full chunk (coefficients with the layers first)."""
    new_weights, new_momentum = [], []
    for layer, (weight, z, error) in enumerate(zip(weights, inputs, errors, strict=True)):
        new = coefficients.memory_carry[layer][..., -1, None, None] * weight
        if momentum is not None and coefficients.momentum_carry is not None:
            assert coefficients.final_carry is not None and coefficients.final_write is not None
            new.addcmul_(coefficients.momentum_carry[layer][..., -1, None, None], momentum[layer])
            kept = coefficients.final_carry[layer][..., None, None] * momentum[layer]
            new_momentum.append(_add_outer(kept, z, error, coefficients.final_write[layer]))
        new_weights.append(_add_outer(new, z, error, coefficients.write[layer][..., -1, :]))
    return tuple(new_weights), None if momentum is None else tuple(new_momentum)


def _add_outer(out: Tensor, left: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
    """out + left^T diag(diagonal) right, in place. left, right: [..., C, .]; diagonal: [..., C]."""
    if left.shape[-1] <= right.shape[-1]:
        left = left * diagonal.unsqueeze(-1)
    else:
        right = right * diagonal.unsqueeze(-1)
    return _add_product(out, left.mT, right)


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
    [B, H, L, T]. Returns y [B, H, T, K] and the weights and momentum after the last chunk.
    """
    layers = len(weights)
    inputs = (*rows, scale, *gates, *weights, *(momentum or ()))
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, *final = _ChunkScan.apply(layers, chunk_size, train, *inputs)
    return y, tuple(final[:layers]), None if momentum is None else tuple(final[layers:])


class _ChunkScan(torch.autograd.Function):
    """See `scan_chunks`. Inside, B and H are one dimension N: one memory each."""

    @staticmethod
    def forward(
        ctx: Any, layers: int, size: int, train: bool, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> Any:
        scale, theta, log_retain, log_eta, *start = rest
        batch, heads, tokens, _ = q.shape
        text = _Text(q, k, v, Gates(theta, log_retain, log_eta), scale, size)
        state = _State.of([x.flatten(0, 1) for x in start], layers)
        # States are kept every so many chunks and computed again between: they are the largest.
        interval = max(1, math.isqrt(tokens // size // 2))
        states: list[Tensor] = []
        products: list[Tensor | None] = []
        y = torch.empty_like(q)
        for n in range(tokens // size):
            chunk = _Chunk(text, n, state)
            chunk.put(y, chunk.read())
            if train:
                states += state.tensors if n % interval == 0 else ()
                products += chunk.products()
            state = chunk.carry()
        ctx.layers, ctx.size, ctx.interval = layers, size, interval
        ctx.states, ctx.products = len(states), len(products)
        ctx.save_for_backward(q, k, v, scale, theta, log_retain, log_eta, *states, *products)
        return (y, *(x.unflatten(0, (batch, heads)) for x in state.tensors))

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dfinal: Tensor) -> Any:
        q, k, v, scale, theta, log_retain, log_eta, *saved = ctx.saved_tensors
        gates = Gates(theta, log_retain, log_eta)
        text = _Text(q, k, v, gates, scale, ctx.size)
        chunks = q.shape[2] // ctx.size
        states = saved[: ctx.states]
        each = ctx.products // chunks
        products = [saved[at : at + each] for at in range(ctx.states, len(saved), each)]
        drows = [torch.empty_like(x) for x in (q, k, v)]
        dgates = gates.map(torch.empty_like)
        dscale = None if scale is None else torch.zeros_like(scale)
        # Gradients of the state are scaled and added to in place from here on: copies.
        dstate = _State.of([x.flatten(0, 1).clone() for x in dfinal], ctx.layers)
        for first in reversed(range(0, chunks, ctx.interval)):
            state = _State.of(states[-len(dfinal) :], ctx.layers)
            del states[-len(dfinal) :]
            group: list[_Chunk] = []
            for n in range(first, min(first + ctx.interval, chunks)):
                state = group[-1].carry() if group else state
                group.append(_Chunk(text, n, state, products[n]))
            while group:
                chunk = group.pop()
                into, gate_grads, into_scale = chunk.backward(chunk.rows(dy), dstate)
                for whole, part in zip(drows, into, strict=True):
                    chunk.put(whole, part)
                chunk.put_gates(dgates, gate_grads)
                if dscale is not None and into_scale is not None:
                    dscale += into_scale.unflatten(0, q.shape[:2]).sum(0)
        dstart = [x.unflatten(0, q.shape[:2]) for x in dstate.tensors]
        return (None, None, None, *drows, dscale, *dgates, *dstart)


class _State(NamedTuple):
    """Weights and momentum, per layer [N, in, out]."""

    weights: Sequence[Tensor]
    momentum: Sequence[Tensor] | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layers: int) -> "_State":
        return cls(tensors[:layers], tensors[layers:] or None)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.weights, *(self.momentum or ())]


class _Text(NamedTuple):
    """What is read: q, k, v [B, H, T, K], gates [B, H, L, T], scale [H, K] and the chunk length."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    scale: Tensor | None
    size: int


class _Chunk:
    """One chunk, from the state at its start and, where they were kept, its `products`."""

    def __init__(
        self,
        text: _Text,
        index: int,
        state: _State,
        products: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.start, self.size = index * text.size, text.size
        self.batch = text.q.shape[0]
        self.scale = None
        if text.scale is not None:
            self.scale = text.scale.expand(self.batch, -1, -1).flatten(0, 1)
        self.weights, self.momentum = state
        self.q, k, v = self.rows(text.q), self.rows(text.k), self.rows(text.v)
        self.gates = text.gates.map(self._gate)
        self.coefficients, self.decays = coefficients_and_decays(self.gates)
        layers = len(self.weights)
        hidden: Any = None if products is None else products[:layers]
        self.inner = InnerGradient(k, v, self.weights, self.scale, hidden)
        self.reads: list[LayerRead] = []
        if products is not None:
            kept: Any = zip(*[iter(products[layers:])] * 4, strict=True)
            self.reads = [LayerRead(*each) for each in kept]

    def rows(self, x: Tensor) -> Tensor:
        """The chunk's part of [B, H, T, K] as [N, C, K]."""
        return x.narrow(2, self.start, self.size).flatten(0, 1)

    def put(self, whole: Tensor, rows: Tensor) -> None:
        """Back: rows [N, C, K] into their part of [B, H, T, K]."""
        whole.narrow(2, self.start, self.size).copy_(rows.unflatten(0, (self.batch, -1)))

    def _gate(self, gate: Tensor) -> Tensor:
        """The chunk's part of [B, H, L, T] as [L, N, C]."""
        return gate.narrow(3, self.start, self.size).permute(2, 0, 1, 3).flatten(1, 2)

    def put_gates(self, whole: Gates, part: Gates) -> None:
        """Back: gates [L, N, C] into their part of [B, H, L, T]."""
        for gate, new in zip(whole, part, strict=True):
            if gate is not None and new is not None:
                new = new.unflatten(1, (self.batch, -1)).permute(1, 2, 0, 3)
                gate.narrow(3, self.start, self.size).copy_(new)

    def read(self) -> Tensor:
        """y [N, C, K]."""
        self.reads = read_layers(
            self.q,
            self.weights,
            self.momentum,
            self.inner.inputs,
            self.inner.errors,
            self.coefficients,
        )
        return memory_output(self.q, self.reads[-1].out, self.scale)

    def products(self) -> list[Tensor | None]:
        """What `backward` would have to multiply again, after `read`."""
        return [*self.inner.hidden, *(tensor for read in self.reads for tensor in read)]

    def carry(self) -> _State:
        """The state after the chunk."""
        return _State(
            *carry_chunk(
                self.weights, self.momentum, self.inner.inputs, self.inner.errors, self.coefficients
            )
        )

    def backward(self, dy: Tensor, dstate: _State) -> tuple[Tensors, Gates, Tensor | None]:
        """From dy [N, C, K] and the gradients of the state after the chunk, which become those of
        the state before it, to those of q, k, v, of the gates and of the scale [N, K]."""
        self.grads = self.coefficients.map(torch.zeros_like)
        self.dinputs: list[Tensor] = []
        self.derrors: list[Tensor] = []
        self.dweights, self.dmomentum = dstate
        for layer in range(len(self.weights)):
            self._carry_backward(layer)
        dq, dscale = self._read_backward(dy)
        dk, dv, more = self.inner.backward(self.dinputs, self.derrors, self.dweights)
        dgates = coefficients_backward(self.gates, self.decays, self.coefficients, self.grads)
        return (dq, dk, dv), dgates, None if dscale is None or more is None else dscale + more

    def _carry_backward(self, layer: int) -> None:
        """Through M_C and S_C of one layer: dinputs, derrors, and dstate scaled by the carries."""
        coefficients, grads = self.coefficients, self.grads
        z, error = self.inner.inputs[layer], self.inner.errors[layer]
        dweight = self.dweights[layer]
        grads.memory_carry[layer][:, -1] = _dot(dweight, self.weights[layer])
        dz, derror, grads.write[layer][:, -1] = _outer_backward(
            dweight, z, error, coefficients.write[layer][:, -1]
        )
        if self.momentum is not None:
            assert self.dmomentum is not None
            assert coefficients.momentum_carry is not None and grads.momentum_carry is not None
            assert coefficients.final_carry is not None and grads.final_carry is not None
            assert coefficients.final_write is not None and grads.final_write is not None
            dmomentum = self.dmomentum[layer]
            grads.momentum_carry[layer][:, -1] = _dot(dweight, self.momentum[layer])
            grads.final_carry[layer] = _dot(dmomentum, self.momentum[layer])
            _, _, grads.final_write[layer] = _outer_backward(
                dmomentum, z, error, coefficients.final_write[layer], dz, derror
            )
            dmomentum.mul_(coefficients.final_carry[layer][:, None, None])
            last = coefficients.momentum_carry[layer][:, -1, None, None]
            dmomentum.addcmul_(dweight, last)
        dweight.mul_(coefficients.memory_carry[layer][:, -1, None, None])
        self.dinputs.append(dz)
        self.derrors.append(derror)

    def _read_backward(self, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Through y_t = M_t(q_t). Returns the gradients of q and of the scale."""
        if self.scale is None:
            dscale, dout = None, dy
        else:
            normed, inverse = normalise(self.reads[-1].out)
            dscale = (dy * normed).sum(-2)
            dout = normalise_backward(dy * self.scale.unsqueeze(-2), normed, inverse)
        for layer in reversed(range(len(self.weights))):
            below = self.reads[layer - 1].out
            dx = self._read_layer_backward(layer, F.gelu(below) if layer else self.q, dout)
            if layer:
                dout = gelu_backward(dx, below)
        return dx if self.scale is None else dx.add_(dy), dscale

    def _read_layer_backward(self, layer: int, x: Tensor, dout: Tensor) -> Tensor:
        """Back through one layer's read of x. Returns dx."""
        coefficients, grads = self.coefficients, self.grads
        _, product, through, surprise = self.reads[layer]
        write = coefficients.write[layer]
        dproduct = dout @ self.inner.errors[layer].mT
        grads.write[layer].addcmul_(product, dproduct)
        dproduct.mul_(write)
        self.derrors[layer].baddbmm_((product * write).mT, dout)
        self.dinputs[layer].baddbmm_(dproduct.mT, x)
        dx = dproduct @ self.inner.inputs[layer]
        carry, dcarry = coefficients.memory_carry[layer], grads.memory_carry[layer]
        _carried_backward(
            x, self.weights[layer], through, carry, dout, dx, self.dweights[layer], dcarry
        )
        if self.momentum is not None:
            assert self.dmomentum is not None
            assert coefficients.momentum_carry is not None and grads.momentum_carry is not None
            carry, dcarry = coefficients.momentum_carry[layer], grads.momentum_carry[layer]
            _carried_backward(
                x, self.momentum[layer], surprise, carry, dout, dx, self.dmomentum[layer], dcarry
            )
        return dx


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b over all but the first dimension."""
    return (a * b).sum((-1, -2))


def _outer_backward(
    dout: Tensor,
    left: Tensor,
    right: Tensor,
    diagonal: Tensor,
    dleft: Tensor | None = None,
    dright: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through left^T diag(diagonal) right. Returns the gradients of left, right (added in place
    where given) and diagonal."""
    column = diagonal.unsqueeze(-1)
    if left.shape[-1] <= right.shape[-1]:
        narrow, wide, dnarrow, dwide, to_narrow = left, right, dleft, dright, dout.mT
    else:
        narrow, wide, dnarrow, dwide, to_narrow = right, left, dright, dleft, dout
    pulled = wide @ to_narrow
    ddiagonal = (narrow * pulled).sum(-1)
    scaled = narrow * column
    if dnarrow is None or dwide is None:
        dnarrow, dwide = pulled.mul_(column), scaled @ to_narrow.mT
    else:
        dnarrow.addcmul_(pulled, column)
        dwide.baddbmm_(scaled, to_narrow.mT)
    if narrow is left:
        return dnarrow, dwide, ddiagonal
    return dwide, dnarrow, ddiagonal


def _carried_backward(
    x: Tensor,
    weight: Tensor,
    product: Tensor | None,
    carry: Tensor,
    dout: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dcarry: Tensor,
) -> None:
    """Back through `_carried`, with what it gave as product; adds to dx, dweight, dcarry."""
    column = carry.unsqueeze(-1)
    if product is None:
        pulled = dout @ weight.mT
        dcarry += (x * pulled).sum(-1)
        dx.addcmul_(pulled, column)
        dweight.baddbmm_((x * column).mT, dout)
    else:
        dcarry += (product * dout).sum(-1)
        scaled = dout * column
        dx.baddbmm_(scaled, weight.mT)
        dweight.baddbmm_(x.mT, scaled)
