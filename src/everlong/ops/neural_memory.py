"""The neural long-term memory of Titans: an MLP that takes gradient steps while it reads.

Per token t and head, with M_c the memory at the start of t's chunk (Titans v1 section 3.1):

    u_t = gradient of |M_c(k_t) - v_t|^2
    S_t = eta_t S_{t-1} - theta_t u_t
    M_t = (1 - alpha_t) M_{t-1} + S_t        y_t = M_t(q_t)

`recurrent_neural_memory` computes this literally; `chunk_neural_memory` computes the same by
matrix products alone, without ever forming M_t (section 3.2). Dimensions: B batch, T tokens,
H heads, K key and value size, L layers of the memory network, C chunk length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from everlong.ops.arguments import check_lengths, check_memory, check_rank, check_shape
from everlong.ops.backend import native_takes, refuse_transforms
from everlong.ops.chunk_scan import (
    carry_chunk,
    layer_coefficients,
    read_layers,
    scale_of_each,
    scan_chunks,
)
from everlong.ops.decay import ChunkCoefficients, Gates, chunk_coefficients
from everlong.ops.documents import Piece
from everlong.ops.inner_mlp import NORM_EPS, InnerGradient, apply_memory, memory_output
from everlong.ops.memory_state import NeuralMemoryState
from everlong.ops.native.scan import MAX_LAYERS, read_native, scan_wins
from everlong.ops.state import agreed, per_row


def read_neural_memory(q: Tensor, weights: Sequence[Tensor], scale: Tensor | None) -> Tensor:
    """y = M(q) at given weights, without writing (Titans v1 eq. 15).

    q: [B, T, H, K]; weights per layer [B, H, in, out]; scale [H, K] or None for a plain MLP.
    Returns [B, T, H, K]. Raises ValueError when shapes do not fit.
    """
    check_rank("q", q, "B, T, H, K")
    batch, _, heads, size = q.shape
    check_memory(weights, batch, heads, size)
    if scale is not None:
        check_shape("scale", scale, "H, K", (heads, size))
    rows = q.transpose(1, 2).to(weights[0].dtype)
    scale = None if scale is None else scale.to(rows.dtype)
    with torch.autocast(q.device.type, enabled=False):
        takes = native_takes(rows, scale, *weights) and len(weights) <= MAX_LAYERS
        if takes and scan_wins(rows):
            return read_native(rows, weights, scale).transpose(1, 2).to(q.dtype)
        return apply_memory(rows, weights, scale).transpose(1, 2).to(q.dtype)


def recurrent_neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_retain: Tensor | None,
    log_eta: Tensor | None,
    *,
    state: NeuralMemoryState,
    scale: Tensor | None = None,
) -> tuple[Tensor, NeuralMemoryState]:
    """The reference: one token at a time, the inner gradient by autograd. Slow, and meant to be.

    Arguments and results are those of `chunk_neural_memory`; all rows must stand at one position.
    """
    gates = Gates(theta, log_retain, log_eta)
    check_inputs(q, k, v, gates, state, scale, None)
    scale = None if scale is None else scale.to(state.dtype)
    k, v, gates = k.to(state.dtype), v.to(state.dtype), gates.map(lambda gate: gate.to(state.dtype))
    position = agreed(state.position)
    if isinstance(position, Tensor):
        raise ValueError(f"the reference wants equal positions, got {position.tolist()}")
    weights: Sequence[Tensor] = state.weights
    momentum: Sequence[Tensor] | None = state.momentum
    for i in range(position):
        surprise = [
            z[:, :, i, :, None] * e[:, :, i, None, :]
            for z, e in zip(state.inputs, state.errors, strict=True)
        ]
        slot = state.gates.map(lambda gate: gate[..., i])  # noqa: B023 (called at once)
        weights, momentum = _write_token(weights, momentum, surprise, slot)
    outputs = []
    for t in range(q.shape[1]):
        inputs, errors, surprise = _surprise_by_autograd(k[:, t], v[:, t], state.weights, scale)
        token = gates.map(lambda gate: gate[:, t])  # noqa: B023
        weights, momentum = _write_token(weights, momentum, surprise, token)
        outputs.append(read_neural_memory(q[:, t : t + 1], weights, scale))
        token = token.map(lambda gate: gate.unsqueeze(-1))
        state = state.insert(inputs, errors, token, position, 1)
        position += 1
        if position == state.chunk_size:
            state, position = state.reopen(weights, momentum), 0
    return torch.cat(outputs, 1) if outputs else torch.zeros_like(q), state


def _surprise_by_autograd(
    k: Tensor, v: Tensor, weights: Sequence[Tensor], scale: Tensor | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """z, delta and u of one token (k, v: [B, H, K]) from autograd on the inner loss."""
    with torch.enable_grad():
        # Weights that already carry a history keep it, so that the outer gradient passes through; as
        # views, since k and v may have been made with them, which is no matter of the inner gradient.
        leaves = [w.view_as(w) if w.requires_grad else w.detach().requires_grad_() for w in weights]
        hidden, inputs, products = k.unsqueeze(-2), [], []
        for index, weight in enumerate(leaves):
            inputs.append(torch.nn.functional.gelu(hidden) if index else hidden)
            hidden = inputs[-1] @ weight
            products.append(hidden)
        if scale is not None:
            normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)
            hidden = k.unsqueeze(-2) + scale.unsqueeze(-2) * normed
        loss = (hidden - v.unsqueeze(-2)).square().sum()
        signals = torch.autograd.grad(loss, [*leaves, *products], create_graph=True)
    return inputs, list(signals[len(leaves) :]), list(signals[: len(leaves)])


def _write_token(
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor] | None,
    surprise: Sequence[Tensor],
    gates: Gates,
) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
    """One step of S and M; gates [B, H, L], the rest per layer [B, H, in, out]."""
    theta, log_retain, log_eta = gates.map(lambda gate: gate[..., None, None])
    update = [-theta[:, :, i] * u for i, u in enumerate(surprise)]
    if momentum is not None and log_eta is not None:
        update = [log_eta[:, :, i].exp() * s + update[i] for i, s in enumerate(momentum)]
        momentum = update
    if log_retain is not None:
        weights = [log_retain[:, :, i].exp() * w for i, w in enumerate(weights)]
    return [w + s for w, s in zip(weights, update, strict=True)], momentum


def chunk_neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_retain: Tensor | None,
    log_eta: Tensor | None,
    *,
    state: NeuralMemoryState,
    scale: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, NeuralMemoryState]:
    """The dual form: the equations above by matrix products over chunks.

    q, k, v: [B, T, H, K]. theta: [B, T, H, L], at least 0. log_retain = log(1 - alpha) and
    log_eta: [B, T, H, L], at most 0, or None for no forgetting and no momentum. state: where to go
    on, at any phase, each row at its own; `NeuralMemoryState.initial` starts one and fixes C.
    scale: [H, K], LN's scale, or None for a memory without residual norm. lengths: [B] integers on
    the CPU, how many of the T tokens are real in each row; the rest write nothing and read zeros.
    Returns y [B, T, H, K] in q's type, and the state. Raises ValueError when shapes do not fit.
    """
    gates = Gates(theta, log_retain, log_eta)
    check_inputs(q, k, v, gates, state, scale, lengths)
    refuse_transforms()
    lengths = None if lengths is None else lengths.long()
    dtype, tokens = state.dtype, q.shape[1]
    scale = None if scale is None else scale.to(dtype)
    rows = tuple(x.to(dtype).transpose(1, 2) for x in (q, k, v))
    gates = gates.map(lambda gate: gate.to(dtype).permute(0, 2, 3, 1))
    if not tokens:
        return torch.zeros_like(q), state
    # The state's type is the type of everything here, under autocast too.
    with torch.autocast(q.device.type, enabled=False):
        count, position = agreed(tokens if lengths is None else lengths), agreed(state.position)
        if isinstance(count, int) and count == tokens and isinstance(position, int):
            y, state = _aligned(rows, gates, tokens, replace(state, position=position), scale)
        else:
            y, state = _ragged(rows, gates, per_row(count, q.shape[0]), state, scale)
    return y.transpose(1, 2).to(q.dtype), state


# Below, rows are q, k, v as [B, H, T, K] and gates are [B, H, L, T].
Rows = tuple[Tensor, ...]


def _aligned(
    rows: Rows, gates: Gates, tokens: int, state: NeuralMemoryState, scale: Tensor | None
) -> tuple[Tensor, NeuralMemoryState]:
    """All rows at one position: finish the open chunk, scan whole chunks, open the last one."""
    size, position = state.chunk_size, state.position
    assert isinstance(position, int)
    head = min(size - position, tokens) if position else 0
    whole = (tokens - head) // size * size
    outputs = []

    def part(start: int, length: int) -> tuple[Rows, Gates]:
        if length == tokens:  # the way back through a slice is a copy
            return rows, gates
        return (
            tuple(x.narrow(2, start, length) for x in rows),
            gates.map(lambda gate: gate.narrow(3, start, length)),
        )

    if head:
        y, state = _extend(*part(0, head), state, position, head, scale)
        outputs.append(y)
    if whole:
        y, weights, momentum = scan_chunks(
            *part(head, whole), state.weights, state.momentum, size, scale
        )
        state = replace(state, weights=weights, momentum=momentum)
        outputs.append(y)
    if rest := tokens - head - whole:
        y, state = _extend(*part(head + whole, rest), state, 0, rest, scale)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2), state


def _ragged(
    rows: Rows, gates: Gates, counts: Tensor, state: NeuralMemoryState, scale: Tensor | None
) -> tuple[Tensor, NeuralMemoryState]:
    """As `_aligned`, with rows at positions or of lengths of their own."""
    size, start = state.chunk_size, state.positions
    head = torch.where(start > 0, torch.minimum(size - start, counts), 0)
    whole = (counts - head) // size * size
    y = torch.zeros_like(rows[0])
    if bool(head.any()):
        piece = Piece(torch.zeros_like(head), head, y.device)
        out, state = _extend(*_take(piece, rows, gates), state, start, head, scale)
        y = piece.put(y, out, 2)
    if bool(whole.any()):
        y, state = _scan_ragged(rows, gates, y, head, whole // size, state, scale)
    rest = counts - head - whole
    if bool(rest.any()):
        piece = Piece(head + whole, rest, y.device)
        out, state = _extend(*_take(piece, rows, gates), state, state.positions, rest, scale)
        y = piece.put(y, out, 2)
    return y, replace(state, position=agreed(state.position))


def _scan_ragged(
    rows: Rows,
    gates: Gates,
    y: Tensor,
    first: Tensor,
    chunks: Tensor,
    state: NeuralMemoryState,
    scale: Tensor | None,
) -> tuple[Tensor, NeuralMemoryState]:
    """Whole chunks, `chunks` [B] of them from token `first` [B] on: no row waits or is padded.

    The row with most chunks stands first; one whose chunks are all read leaves at the end.
    """
    order = chunks.argsort(descending=True, stable=True)
    place, layers = order.to(y.device), len(state.weights)
    memory = [x.index_select(0, place) for x in (*state.weights, *(state.momentum or ()))]
    through: list[list[Tensor]] = []
    at = 0
    for count in [n for n in sorted(set(chunks.tolist())) if n]:
        active = order[: int((chunks >= count).sum())]
        through.insert(0, [x[len(active) :] for x in memory])
        memory = [x[: len(active)] for x in memory]
        tokens = torch.full_like(active, (count - at) * state.chunk_size)
        piece = Piece(first[active] + at * state.chunk_size, tokens, y.device, active)
        out, weights, momentum = scan_chunks(
            *_take(piece, rows, gates),
            memory[:layers],
            memory[layers:] or None,
            state.chunk_size,
            scale,
        )
        y, memory, at = piece.put(y, out, 2), [*weights, *(momentum or ())], count
    back = order.argsort().to(y.device)
    final = [torch.cat(parts).index_select(0, back) for parts in zip(memory, *through, strict=True)]
    momentum = None if state.momentum is None else tuple(final[layers:])
    return y, replace(state, weights=tuple(final[:layers]), momentum=momentum)


def _take(piece: Piece, rows: Rows, gates: Gates) -> tuple[Rows, Gates]:
    return tuple(piece.take(x, 2) for x in rows), gates.map(lambda gate: piece.take(gate, 3))


def _extend(
    rows: Rows,
    gates: Gates,
    state: NeuralMemoryState,
    start: int | Tensor,
    count: int | Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, NeuralMemoryState]:
    """Add tokens to the open chunk, in slots start ... start + count - 1, and read them.

    `start` and `count` are integers, or [B] where rows differ (row b uses its first count[b]).
    """
    memories = rows[0].shape[:2]

    def flat(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.flatten(0, 1) for x in tensors]

    def unflat(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.unflatten(0, memories) for x in tensors]

    q, k, v = flat(rows)
    scale = scale_of_each(scale, memories)
    weights = flat(state.weights)
    momentum = None if state.momentum is None else flat(state.momentum)
    inner = InnerGradient(k, v, weights, scale)
    state = state.insert(unflat(inner.inputs), unflat(inner.errors), gates, start, count)
    slots = state.chunk_size
    if not isinstance(state.position, Tensor) and not torch.compiler.is_compiling():
        slots = state.position  # no token sees the empty ones
    chunk = chunk_coefficients(state.gates.map(lambda gate: gate.movedim(2, 0)[..., :slots]))
    read = _slot_rows(chunk, start, q.shape[1])
    coefficients = layer_coefficients(*(c.map(lambda x: x.flatten(1, 2)) for c in (chunk, read)))
    inputs, errors = ([x[:, :slots] for x in flat(rows)] for rows in (state.inputs, state.errors))
    reads = read_layers(q, weights, momentum, inputs, errors, coefficients)
    y = memory_output(q, reads[-1].out, scale).unflatten(0, memories)
    full: bool | Tensor = state.position == state.chunk_size
    if full.any() if isinstance(full, Tensor) else full:
        weights, momentum = carry_chunk(weights, momentum, inputs, errors, coefficients)
        closed = state.reopen(unflat(weights), None if momentum is None else unflat(momentum))
        state = state.restart(full, closed) if isinstance(full, Tensor) else closed
    return y, state


def _slot_rows(coefficients: ChunkCoefficients, start: int | Tensor, length: int) -> ChunkCoefficients:
    """The coefficients' rows of the slots that were just filled."""
    if isinstance(start, int):

        def rows(x: Tensor, dim: int) -> Tensor:
            return x.narrow(dim, start, length)
    else:
        size = coefficients.memory_carry.shape[-1]
        slots = (start[:, None] + torch.arange(length, device="cpu")).clamp(max=size - 1)

        def rows(x: Tensor, dim: int) -> Tensor:
            shape = [1, x.shape[1], *([1] * (x.dim() - 2))]
            shape[dim] = length
            index = slots.to(x.device).view(shape)
            sizes = list(x.shape)
            sizes[dim] = length
            return x.gather(dim, index.expand(sizes))

    carry = coefficients.momentum_carry
    return coefficients._replace(
        memory_carry=rows(coefficients.memory_carry, -1),
        momentum_carry=None if carry is None else rows(carry, -1),
        write=rows(coefficients.write, -2),
    )


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    state: NeuralMemoryState,
    scale: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Refuse what does not fit, before any work."""
    state.check_fields()  # each time: a tensor's data may have been changed since `check`
    layers = len(state.weights)
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q, k, v must agree in [B, T, H, K], got {[tuple(x.shape) for x in (q, k, v)]}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "B, T, H, K")
    batch, tokens, heads, size = q.shape
    state.check_batch(batch)
    for held, width in ((state.weights[0], 2), (state.weights[-1], 3)):
        if held.shape[1] != heads or held.shape[width] != size:
            raise ValueError(
                f"the state's memory has {held.shape[1]} heads of size {held.shape[width]}, the input "
                f"{heads} of size {size}: it belongs to another layer or model"
            )
    if scale is not None:
        check_shape("scale", scale, "H, K", (heads, size))
    if gates.theta.dim() == 4 and gates.theta.shape[3] != layers:
        raise ValueError(
            f"the state's memory has {layers} layers but the gates are for {gates.theta.shape[3]}: it "
            "belongs to another layer or model"
        )
    if state.dtype != torch.promote_types(q.dtype, state.dtype):
        raise ValueError(
            f"the state is {state.dtype} but the input {q.dtype}: start a state in the input's type "
            "(at least float32)"
        )
    if state.device != q.device:
        raise ValueError(
            f"the state is on {state.device}, the input on {q.device}: use state.to({str(q.device)!r})"
        )
    for name, gate in zip(Gates._fields, gates, strict=True):
        if gate is not None:
            check_shape(name, gate, "B, T, H, L", (batch, tokens, heads, layers))
    for name, gate, kept in (
        ("log_retain", gates.log_retain, state.log_retain),
        ("log_eta", gates.log_eta, state.log_eta),
    ):
        if (gate is None) != (kept is None):
            raise ValueError(
                f"{name} is {'absent' if gate is None else 'given'} but the state was started "
                f"{'without' if kept is None else 'with'} it: start the state with the same gates"
            )
    check_lengths(lengths, batch, tokens)
