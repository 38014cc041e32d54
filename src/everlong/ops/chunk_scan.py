"""Whole chunks of the neural memory, one after the other, by matrix products.

The forward pass keeps nothing but the memory at each chunk's start; the backward pass is written
out by hand and recomputes what lies inside a chunk. Backward walks the equations of `read_rows`,
`carry_chunk` and `error_signals` in reverse; a name with d in front is the loss's gradient of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.decay import ChunkCoefficients, Gates, chunk_coefficients
from everlong.ops.inner_mlp import error_signals, gelu_curvature, memory_output, normalise

Tensors = tuple[Tensor, ...]


def read_rows(
    q: Tensor,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    inputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    rows: ChunkCoefficients,
    scale: Tensor | None,
) -> Tensor:
    """y_t = M_t(q_t) without forming M_t; layer by layer

        x W_t = a_t (x W_0) + b_t (x S_0) - ((x z^T) * Gamma[t]) delta

    q: [B, H, N, K]; weights, momentum: at the chunk's start; inputs z and errors delta: of the
    whole chunk, [B, H, C, .]; rows: the coefficients of q's tokens, layers first.
    """
    x = q
    for layer, weight in enumerate(weights):
        if layer:
            x = F.gelu(x)
        out = (x @ weight).mul_(rows.memory_carry[layer].unsqueeze(-1))
        if momentum is not None and rows.momentum_carry is not None:
            out.addcmul_(x @ momentum[layer], rows.momentum_carry[layer].unsqueeze(-1))
        x = _minus_product(out, (x @ inputs[layer].mT) * rows.write[layer], errors[layer])
    return memory_output(q, x, scale)


def _minus_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out - left @ right, in place: a fresh state for each chunk would cost more than its product."""
    flat = out.flatten(0, -3)
    flat.baddbmm_(left.flatten(0, -3), right.flatten(0, -3), alpha=-1)
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
        write = coefficients.write[layer][..., -1, :, None]
        new = coefficients.memory_carry[layer][..., -1, None, None] * weight
        if momentum is not None and coefficients.momentum_carry is not None:
            assert coefficients.final_carry is not None and coefficients.final_write is not None
            new.addcmul_(coefficients.momentum_carry[layer][..., -1, None, None], momentum[layer])
            final_write = coefficients.final_write[layer].unsqueeze(-1)
            final_carry = coefficients.final_carry[layer][..., None, None]
            new_momentum.append(
                _minus_product(final_carry * momentum[layer], (z * final_write).mT, error)
            )
        new_weights.append(_minus_product(new, (z * write).mT, error))
    return tuple(new_weights), None if momentum is None else tuple(new_momentum)


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
    batch, heads = rows[0].shape[:2]
    # Chunks come first, then layers, then one dimension for every memory: contiguous operands.
    q, k, v = (x.unflatten(2, (-1, chunk_size)).movedim(2, 0).flatten(1, 2) for x in rows)
    coefficients = chunk_coefficients(
        gates.map(lambda g: g.unflatten(3, (-1, chunk_size)).permute(3, 2, 0, 1, 4).flatten(2, 3))
    )
    layers = len(weights)
    scale_rows = None if scale is None else scale.expand(batch, heads, -1).flatten(0, 1)
    start = [x.flatten(0, 1) for x in (*weights, *(momentum or ()))]
    y, *final = _ChunkScan.apply(layers, q, k, v, scale_rows, *coefficients, *start)
    y = y.unflatten(1, (batch, heads)).movedim(0, 2).flatten(2, 3)
    final = [x.unflatten(0, (batch, heads)) for x in final]
    return y, tuple(final[:layers]), None if momentum is None else tuple(final[layers:])


class _ChunkScan(torch.autograd.Function):
    """Rows [chunks, N, C, K] through N memories; see `scan_chunks`."""

    @staticmethod
    def forward(ctx: Any, layers: int, q: Tensor, k: Tensor, v: Tensor, scale: Any, *rest: Any) -> Any:
        coefficients, start = ChunkCoefficients(*rest[:5]), rest[5:]
        weights, momentum = start[:layers], start[layers:] or None
        y = torch.empty_like(q)
        starts: list[Tensor] = []
        for n in range(len(q)):
            starts += [*weights, *(momentum or ())]
            now = coefficients.map(lambda c: c[n])  # noqa: B023 (called at once)
            inputs, errors = error_signals(k[n], v[n], weights, scale)
            y[n] = read_rows(q[n], weights, momentum, inputs, errors, now, scale)
            weights, momentum = carry_chunk(weights, momentum, inputs, errors, now)
        ctx.layers = layers
        ctx.save_for_backward(q, k, v, scale, *coefficients, *starts)
        return (y, *weights, *(momentum or ()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dfinal: Tensor) -> Any:
        q, k, v, scale, *rest = ctx.saved_tensors
        coefficients, starts = ChunkCoefficients(*rest[:5]), rest[5:]
        grads = coefficients.map(torch.zeros_like)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dscale = None if scale is None else torch.zeros_like(scale)
        states = len(dfinal)
        dstate = list(dfinal)
        for n in reversed(range(len(q))):
            chunk = _ChunkBackward(
                q[n],
                k[n],
                v[n],
                starts[n * states : n * states + ctx.layers],
                starts[n * states + ctx.layers : (n + 1) * states] or None,
                coefficients.map(lambda c: c[n]),  # noqa: B023
                grads.map(lambda c: c[n]),  # noqa: B023
                None if scale is None else scale.unsqueeze(-2),
            )
            dq[n] = chunk.reading(dy[n])
            chunk.carrying(dstate)
            dk[n], dv[n] = chunk.surprise()
            dstate = [*chunk.dweights, *chunk.dmomentum]
            if dscale is not None:
                dscale += chunk.dscale
        return (None, dq, dk, dv, dscale, *grads, *dstate)


class _ChunkBackward:
    """One chunk, recomputed and differentiated.

    Call `reading`, `carrying`, `surprise` in this order: each adds to the gradients of the chunk's
    inputs z and errors delta, and the last passes those on to k, v and the weights.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Sequence[Tensor],
        momentum: Sequence[Tensor] | None,
        coefficients: ChunkCoefficients,
        grads: ChunkCoefficients,
        scale: Tensor | None,
    ) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.weights, self.momentum = weights, momentum
        self.coefficients, self.grads = coefficients, grads
        self.dscale: Tensor | float = 0.0
        # Filled by `reading`, last layer first, then turned round.
        self.dinputs: list[Tensor] = []
        self.derrors: list[Tensor] = []
        self.dweights: list[Tensor] = []
        self.dmomentum: list[Tensor] = []
        self.inputs, self.hidden = [k], [k @ weights[0]]
        for weight in weights[1:]:
            self.inputs.append(F.gelu(self.hidden[-1]))
            self.hidden.append(self.inputs[-1] @ weight)
        if scale is None:
            self.errors = [2 * (self.hidden[-1] - v)]
        else:
            self.normed, self.inverse = normalise(self.hidden[-1])
            self.residual = 2 * (torch.addcmul(k, scale, self.normed) - v)
            self.slope = scale * self.residual
            self.errors = [_norm_backward(self.slope, self.normed, self.inverse)]
        self.pulled: list[Tensor] = []  # delta_{l+1} W_{l+1}^T, before the slope of GELU
        for weight, hidden in zip(reversed(weights[1:]), reversed(self.hidden[:-1]), strict=True):
            self.pulled.append(self.errors[-1] @ weight.mT)
            self.errors.append(_gelu_backward(self.pulled[-1], hidden))
        self.errors.reverse()
        self.pulled.reverse()

    def reading(self, dy: Tensor) -> Tensor:
        """Through y_t = M_t(q_t). Returns dq."""
        xs, outs, products = [self.q], list[Tensor](), list[Tensor]()
        for layer, (weight, z, error) in enumerate(
            zip(self.weights, self.inputs, self.errors, strict=True)
        ):
            if layer:
                xs.append(F.gelu(outs[-1]))
            x = xs[-1]
            out = (x @ weight).mul_(self.coefficients.memory_carry[layer].unsqueeze(-1))
            if self.momentum is not None:
                carry = self.coefficients.momentum_carry
                assert carry is not None
                out.addcmul_(x @ self.momentum[layer], carry[layer].unsqueeze(-1))
            products.append(x @ z.mT)
            outs.append(out.baddbmm_(products[-1] * self.coefficients.write[layer], error, alpha=-1))
        dq = dy
        if self.scale is None:
            dout, dq = dy, torch.zeros_like(dy)
        else:
            normed, inverse = normalise(outs[-1])
            self.dscale = (dy * normed).sum(-2)
            dout = _norm_backward(dy * self.scale, normed, inverse)
        for layer in reversed(range(len(xs))):
            dx = self._read_layer(layer, xs[layer], products[layer], dout)
            if layer:
                dout = _gelu_backward(dx, outs[layer - 1])
        for kept in (self.dinputs, self.derrors, self.dweights, self.dmomentum):
            kept.reverse()
        return dq + dx

    def _read_layer(self, layer: int, x: Tensor, product: Tensor, dout: Tensor) -> Tensor:
        """Back through one layer's read; product is x z^T. Returns dx."""
        coefficients, grads = self.coefficients, self.grads
        z, error = self.inputs[layer], self.errors[layer]
        carry = coefficients.memory_carry[layer].unsqueeze(-1)
        dx = dout @ self.weights[layer].mT
        grads.memory_carry[layer] = (x * dx).sum(-1)
        dx.mul_(carry)
        self.dweights.append((x * carry).mT @ dout)
        if self.momentum is not None:
            assert coefficients.momentum_carry is not None and grads.momentum_carry is not None
            carry = coefficients.momentum_carry[layer].unsqueeze(-1)
            through = dout @ self.momentum[layer].mT
            grads.momentum_carry[layer] = (x * through).sum(-1)
            dx.addcmul_(through, carry)
            self.dmomentum.append((x * carry).mT @ dout)
        write = coefficients.write[layer]
        dproduct = dout @ error.mT
        torch.mul(product, dproduct, out=grads.write[layer]).neg_()
        dproduct.mul_(write)
        self.derrors.append(((product * write).mT @ dout).neg_())
        self.dinputs.append((dproduct.mT @ x).neg_())
        return dx.baddbmm_(dproduct, z, alpha=-1)

    def carrying(self, dstate: Sequence[Tensor]) -> None:
        """Through M_C and S_C."""
        coefficients, grads = self.coefficients, self.grads
        layers = len(self.weights)
        for layer, (z, error, weight) in enumerate(
            zip(self.inputs, self.errors, self.weights, strict=True)
        ):
            dweight = dstate[layer]
            parts = [(dweight, coefficients.write[layer][:, -1], grads.write[layer][:, -1])]
            grads.memory_carry[layer][:, -1] += (dweight * weight).sum((-1, -2))
            last = coefficients.memory_carry[layer][:, -1, None, None]
            self.dweights[layer].addcmul_(dweight, last)
            if self.momentum is not None:
                momentum, dmomentum = self.momentum[layer], dstate[layers + layer]
                assert coefficients.momentum_carry is not None and grads.momentum_carry is not None
                assert coefficients.final_carry is not None and grads.final_carry is not None
                assert coefficients.final_write is not None and grads.final_write is not None
                grads.momentum_carry[layer][:, -1] += (dweight * momentum).sum((-1, -2))
                grads.final_carry[layer] = (dmomentum * momentum).sum((-1, -2))
                last = coefficients.momentum_carry[layer][:, -1, None, None]
                final = coefficients.final_carry[layer][:, None, None]
                self.dmomentum[layer].addcmul_(dweight, last).addcmul_(dmomentum, final)
                parts.append((dmomentum, coefficients.final_write[layer], grads.final_write[layer]))
            for dnew, coefficient, dcoefficient in parts:
                through = error @ dnew.mT
                dcoefficient -= (z * through).sum(-1)
                self.dinputs[layer].addcmul_(through, coefficient.unsqueeze(-1), value=-1)
                self.derrors[layer].addcmul_(z @ dnew, coefficient.unsqueeze(-1), value=-1)

    def surprise(self) -> tuple[Tensor, Tensor]:
        """Through the error signals and the memory's forward pass on k. Returns dk, dv."""
        dhidden = []
        for layer, weight in enumerate(self.weights[1:]):
            hidden, derror = self.hidden[layer], self.derrors[layer]
            dpulled = _gelu_backward(derror, hidden)
            dhidden.append(derror.mul_(self.pulled[layer]).mul_(gelu_curvature(hidden)))
            self.derrors[layer + 1].baddbmm_(dpulled, weight)
            self.dweights[layer + 1].baddbmm_(dpulled.mT, self.errors[layer + 1])
        derror = self.derrors[-1]
        if self.scale is None:
            dresidual = derror
            dhidden.append(2 * derror)
            dk: Tensor | float = 0.0
        else:
            dslope = _norm_backward(derror, self.normed, self.inverse)
            size = derror.shape[-1]
            both = (derror * self.errors[-1]).sum(-1, keepdim=True) / size
            dnormed = self.slope * (derror * self.normed).sum(-1, keepdim=True)
            dnormed.addcmul_(derror, (self.slope * self.normed).sum(-1, keepdim=True))
            dnormed.mul_(self.inverse / -size)
            dresidual = dslope * self.scale
            dnormed.addcmul_(dresidual, self.scale, value=2)
            self.dscale = self.dscale + (dslope * self.residual + 2 * (dresidual * self.normed)).sum(-2)
            through = _norm_backward(dnormed, self.normed, self.inverse)
            dhidden.append(through.addcmul_(self.normed * both, self.inverse, value=-1))
            dk = 2 * dresidual
        for layer in reversed(range(len(self.weights))):
            self.dweights[layer].baddbmm_(self.inputs[layer].mT, dhidden[layer])
            dinput = self.dinputs[layer].baddbmm_(dhidden[layer], self.weights[layer].mT)
            if layer:
                dhidden[layer - 1].add_(_gelu_backward(dinput, self.hidden[layer - 1]))
        return dinput + dk, -2 * dresidual


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x)


def _norm_backward(grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Back through LayerNorm without scale; symmetric, so it serves the inner gradient as well."""
    projected = torch.addcmul(
        grad - grad.mean(-1, keepdim=True),
        normed,
        (grad * normed).mean(-1, keepdim=True),
        value=-1,
    )
    return projected.mul_(inverse)
