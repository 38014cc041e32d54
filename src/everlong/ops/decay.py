"""Cumulative decays of gates inside a chunk, built in log space.

Every gate lies in (0, 1] and comes as its logarithm, so that products of many gates are sums
and nothing divides by a decay that underflowed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everlong.ops.derivatives import first_derivatives_only


class Gates(NamedTuple):
    """theta, log(1 - alpha) and log(eta) side by side; None is no forgetting, no momentum."""

    theta: Tensor
    log_retain: Tensor | None
    log_eta: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Gates":
        """The gates with `function` applied to those that exist."""
        theta, log_retain, log_eta = self
        return Gates(
            function(theta),
            None if log_retain is None else function(log_retain),
            None if log_eta is None else function(log_eta),
        )


class ChunkCoefficients(NamedTuple):
    """How M_t and S_C of a chunk depend on its start and on the rank-1 gradients u_i inside it.

    M_t = memory_carry[t] M_0 + momentum_carry[t] S_0 + sum_{i<=t} write[t, i] u_i
    S_C = final_carry S_0 + sum_i final_write[i] u_i

    `momentum_carry`, `final_carry` and `final_write` are None where there is no momentum.
    """

    memory_carry: Tensor  # [..., C]     a_t
    momentum_carry: Tensor | None  # [..., C]     b_t
    write: Tensor  # [..., C, C]  -Gamma = -A E diag(theta), lower triangular
    final_carry: Tensor | None  # [...]        product of all eta
    final_write: Tensor | None  # [..., C]     -theta_i E[C, i]

    def map(self, function: Callable[[Tensor], Tensor]) -> "ChunkCoefficients":
        """The coefficients with `function` applied to those that exist."""

        def apply(x: Tensor | None) -> Tensor | None:
            return None if x is None else function(x)

        return ChunkCoefficients(
            function(self.memory_carry),
            apply(self.momentum_carry),
            function(self.write),
            apply(self.final_carry),
            apply(self.final_write),
        )


class Decays(NamedTuple):
    """What a chunk's coefficients are made of; their backward pass needs it again."""

    retained: Tensor  # [..., C, C]  A[t, s] = product of 1 - alpha_j over s < j <= t
    surprise: Tensor | None  # [..., C, C]  E[s, i] = product of eta_j over i < j <= s
    start: Tensor | None  # [..., C]     product of eta_j over j <= s
    path: Tensor  # [..., C, C]  A E


def decay_matrix(log_gate: Tensor) -> Tensor:
    """D[t, s] = product of gate_j over s < j <= t; 0 above the diagonal, 1 on it.

    log_gate: [..., C], each <= 0. Returns [..., C, C].

    The sums run over each column's own gates instead of subtracting two running totals: a single
    strong decay early in the chunk would otherwise cost all digits of what comes after it. What is
    masked is so before `exp`, which would overflow there and have NaN for a gradient.
    """
    finite = log_gate.clamp(min=torch.finfo(log_gate.dtype).min).unsqueeze(-1)
    return (finite * _ones(log_gate).tril_(-1)).cumsum_(-2).exp_().tril_()


def _decay_matrix_backward(matrix: Tensor, dmatrix: Tensor) -> Tensor:
    """d log_gate_j = sum of dD[t, s] D[t, s] over s < j <= t."""
    # Row j of the product sums the rows t >= j; the columns s < j of it are what counts.
    later = _ones(matrix[..., 0]).triu_() @ (dmatrix * matrix)
    return later.tril_(-1).sum(-1)


def _ones(gate: Tensor) -> Tensor:
    """[C, C] for gates [..., C]."""
    size = gate.shape[-1]
    return torch.ones(size, size, dtype=gate.dtype, device=gate.device)


def chunk_coefficients(gates: Gates) -> ChunkCoefficients:
    """The coefficients of the dual form (Titans v1 section 3.2, closed form with momentum).

    gates: [..., C] each.
    """
    return ChunkCoefficients(*_coefficients(*gates))


def coefficients_and_decays(gates: Gates) -> tuple[ChunkCoefficients, Decays]:
    """As `chunk_coefficients`, for a backward pass by `coefficients_backward` instead of autograd."""
    theta, log_retain, log_eta = gates
    minus_theta = -theta
    if log_retain is None:
        retained = _ones(theta).tril_().expand(*theta.shape, -1)
        memory_carry = torch.ones_like(theta)
    else:
        retained = decay_matrix(log_retain)
        memory_carry = log_retain.cumsum(-1).exp_()
    if log_eta is None:
        write = retained * minus_theta.unsqueeze(-2)
        coefficients = ChunkCoefficients(memory_carry, None, write, None, None)
        return coefficients, Decays(retained, None, None, retained)
    surprise = decay_matrix(log_eta)
    start = log_eta.cumsum(-1).exp_()
    path = retained @ surprise
    coefficients = ChunkCoefficients(
        memory_carry=memory_carry,
        momentum_carry=(retained * start.unsqueeze(-2)).sum(-1),
        write=path * minus_theta.unsqueeze(-2),
        final_carry=start[..., -1],
        final_write=surprise[..., -1, :] * minus_theta,
    )
    return coefficients, Decays(retained, surprise, start, path)


def coefficients_backward(
    gates: Gates, decays: Decays, coefficients: ChunkCoefficients, grads: ChunkCoefficients
) -> Gates:
    """The loss's gradients of the gates from those of the coefficients."""
    theta, log_retain, log_eta = gates
    dtheta = (grads.write * decays.path).sum(-2).neg_()
    dretained = grads.write * -theta.unsqueeze(-2)
    dlog_retain = dlog_eta = None
    if log_eta is not None:
        assert decays.surprise is not None and decays.start is not None
        assert grads.momentum_carry is not None
        assert grads.final_carry is not None and grads.final_write is not None
        dtheta -= grads.final_write * decays.surprise[..., -1, :]
        dsurprise = decays.retained.mT @ dretained
        dsurprise[..., -1, :] -= grads.final_write * theta
        dstart = (decays.retained * grads.momentum_carry.unsqueeze(-1)).sum(-2)
        dstart[..., -1] += grads.final_carry
        dlog_eta = _decay_matrix_backward(decays.surprise, dsurprise)
        dlog_eta += _sum_of_later(dstart * decays.start)
        dretained = dretained @ decays.surprise.mT
        dretained.addcmul_(grads.momentum_carry.unsqueeze(-1), decays.start.unsqueeze(-2))
    if log_retain is not None:
        dlog_retain = _decay_matrix_backward(decays.retained, dretained)
        dlog_retain += _sum_of_later(grads.memory_carry * coefficients.memory_carry)
    return Gates(dtheta, dlog_retain, dlog_eta)


def _sum_of_later(x: Tensor) -> Tensor:
    """Backward of `cumsum(-1)`."""
    return x.flip(-1).cumsum_(-1).flip(-1)


@torch.compiler.allow_in_graph
def _coefficients(*gates: Tensor | None) -> tuple[Any, ...]:
    return _Coefficients.apply(*gates)


class _Coefficients(torch.autograd.Function):
    """`coefficients_and_decays` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, log_retain: Tensor | None, log_eta: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gates = Gates(theta, log_retain, log_eta)
        coefficients, decays = coefficients_and_decays(gates)
        ctx.save_for_backward(*gates, *decays, coefficients.memory_carry)
        return tuple(coefficients)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, *grads: Any) -> Gates:
        *saved, memory_carry = ctx.saved_tensors
        gates, decays = Gates(*saved[:3]), Decays(*saved[3:])
        coefficients = ChunkCoefficients(memory_carry, None, memory_carry, None, None)
        with torch.autocast(memory_carry.device.type, enabled=False):
            return coefficients_backward(gates, decays, coefficients, ChunkCoefficients(*grads))
