"""What a memory does while it reads, token by token: for pictures and analyses, not for speed."""

from typing import NamedTuple

import torch
from torch import Tensor

from everlong.ops.chunk_scan import scale_of_each
from everlong.ops.decay import Gates, chunk_coefficients
from everlong.ops.documents import Piece
from everlong.ops.inner_mlp import InnerGradient
from everlong.ops.memory_state import NeuralMemoryState
from everlong.ops.neural_memory import check_inputs, chunk_neural_memory
from everlong.ops.state import per_row


class MemoryTrace(NamedTuple):
    """One number for each token, head and (where it says so) layer of the memory; 0 at pads."""

    inner_loss: Tensor  # [B, T, H]     |M(k) - v|^2 at the start of the token's chunk
    surprise: Tensor  # [B, T, H, L]  norm of its gradient u
    alpha: Tensor  # [B, T, H, L]  forgetting; 0 without decay
    eta: Tensor  # [B, T, H, L]  momentum's decay; 0 without momentum
    theta: Tensor  # [B, T, H, L]  inner learning rate
    memory_norm: Tensor  # [B, T, H, L]  Frobenius norm of M_t


def trace_neural_memory(
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    state: NeuralMemoryState,
    scale: Tensor | None,
    lengths: Tensor | None = None,
) -> MemoryTrace:
    """Arguments and errors as `chunk_neural_memory`'s. Without gradients; chunk by chunk."""
    check_inputs(k, k, v, gates, state, scale, lengths)
    tokens, batch = k.shape[1], k.shape[0]
    counts = per_row(tokens if lengths is None else lengths, batch)
    offset = torch.zeros_like(counts)
    with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
        k, v, gates = k.to(state.dtype), v.to(state.dtype), gates.map(lambda x: x.to(state.dtype))
        empty = torch.zeros_like(gates.theta)
        alpha = empty if gates.log_retain is None else -gates.log_retain.expm1()
        eta = empty if gates.log_eta is None else gates.log_eta.exp()
        loss, surprise, norm = torch.zeros_like(empty[..., 0]), empty.clone(), empty.clone()
        while bool((offset < counts).any()):
            start = state.positions
            count = torch.minimum(state.chunk_size - start, counts - offset)
            piece = Piece(offset, count, k.device)
            its_k, its_v, its_gates = piece.take(k), piece.take(v), gates.map(piece.take)
            found = _of_chunk(its_k, its_v, its_gates, state, scale, start, count)
            loss, surprise, norm = (
                piece.put(whole, part)
                for whole, part in zip((loss, surprise, norm), found, strict=True)
            )
            _, state = chunk_neural_memory(
                its_k, its_k, its_v, *its_gates, state=state, scale=scale, lengths=count
            )
            offset = offset + count
        real = (torch.arange(tokens, device="cpu") < counts[:, None]).to(k.device)[..., None, None]
        alpha, eta, theta = (x.where(real, 0.0) for x in (alpha, eta, gates.theta))
    return MemoryTrace(loss, surprise, alpha, eta, theta, norm)


def _of_chunk(
    k: Tensor,
    v: Tensor,
    gates: Gates,
    state: NeuralMemoryState,
    scale: Tensor | None,
    start: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """inner_loss [B, T, H], surprise and memory_norm [B, T, H, L] of tokens of one chunk."""
    memories = (k.shape[0], k.shape[2])
    rows_k, rows_v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    weights = [w.flatten(0, 1) for w in state.weights]
    scale = None if scale is None else scale.to(state.dtype)
    inner = InnerGradient(rows_k, rows_v, weights, scale_of_each(scale, memories))
    inputs = [x.unflatten(0, memories) for x in inner.inputs]
    errors = [x.unflatten(0, memories) for x in inner.errors]
    residual = inner.errors[-1] / 2 if scale is None else inner.residual
    loss = residual.square().sum(-1).unflatten(0, memories)
    surprise = torch.stack(
        [z.norm(dim=-1) * e.norm(dim=-1) for z, e in zip(inputs, errors, strict=True)], -1
    )
    gates = gates.map(lambda gate: gate.to(state.dtype).permute(0, 2, 3, 1))
    norm = _norms(state.insert(inputs, errors, gates, start, count))
    slots = (start[:, None] + torch.arange(k.shape[1], device="cpu")).clamp(max=state.chunk_size - 1)
    index = slots.to(k.device)[:, None, :, None].expand(-1, norm.shape[1], -1, norm.shape[3])
    return loss.transpose(1, 2), surprise.transpose(1, 2), norm.gather(2, index).transpose(1, 2)


def _norms(state: NeuralMemoryState) -> Tensor:
    """|M_t| for every slot t of the open chunk, [B, H, C, L], without forming M_t.

    With M_t = a M_0 + b S_0 + sum_i w_i z_i^T delta_i, products of M's parts with each other.
    """
    coefficients = chunk_coefficients(state.gates)
    norms = []
    for layer, weight in enumerate(state.weights):
        z, error = state.inputs[layer], state.errors[layer]
        a, write = coefficients.memory_carry[:, :, layer], coefficients.write[:, :, layer]

        def written(matrix: Tensor, z: Tensor = z, error: Tensor = error) -> Tensor:
            return ((z @ matrix) * error).sum(-1)

        def inner(left: Tensor, right: Tensor) -> Tensor:
            return (left * right).sum((-1, -2)).unsqueeze(-1)

        square = a**2 * inner(weight, weight)
        cross = a * (write @ written(weight).unsqueeze(-1)).squeeze(-1)
        if state.momentum is not None and coefficients.momentum_carry is not None:
            start, b = state.momentum[layer], coefficients.momentum_carry[:, :, layer]
            square = square + b**2 * inner(start, start) + 2 * a * b * inner(weight, start)
            cross = cross + b * (write @ written(start).unsqueeze(-1)).squeeze(-1)
        gram = (z @ z.mT) * (error @ error.mT)
        square = square + 2 * cross + ((write @ gram) * write).sum(-1)
        norms.append(square.clamp(min=0).sqrt())
    return torch.stack(norms, -1)
