"""Cumulative decays of gates inside a chunk, built in log space.

Every gate lies in (0, 1] and comes as its logarithm, so that products of many gates are sums
and nothing divides by a decay that underflowed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


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

    M_t = memory_carry[t] M_0 + momentum_carry[t] S_0 - sum_{i<=t} write[t, i] u_i
    S_C = final_carry S_0 - sum_i final_write[i] u_i

    `momentum_carry`, `final_carry` and `final_write` are None where there is no momentum.
    """

    memory_carry: Tensor  # [..., C]     a_t
    momentum_carry: Tensor | None  # [..., C]     b_t
    write: Tensor  # [..., C, C]  Gamma = A E diag(theta), lower triangular
    final_carry: Tensor | None  # [...]        product of all eta
    final_write: Tensor | None  # [..., C]     theta_i E[C, i]

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


def decay_matrix(log_gate: Tensor) -> Tensor:
    """D[t, s] = product of gate_j over s < j <= t; 0 above the diagonal, 1 on it.

    log_gate: [..., C], each <= 0. Returns [..., C, C].

    The sums run over each column's own gates instead of subtracting two running totals: a single
    strong decay early in the chunk would otherwise cost all digits of what comes after it. The
    upper triangle is masked before `exp`, since it overflows there and its gradient is NaN.
    """
    return _DecayMatrix.apply(log_gate)


class _DecayMatrix(torch.autograd.Function):
    """D = exp(sums of log gates); d log_gate_j = sum of dD[t, s] D[t, s] over s < j <= t."""

    @staticmethod
    def forward(ctx: Any, log_gate: Tensor) -> Tensor:
        above = _upper_triangle(log_gate, 0)
        sums = torch.where(above, 0.0, log_gate.unsqueeze(-1)).cumsum_(-2)
        matrix = sums.masked_fill_(_upper_triangle(log_gate, 1), -torch.inf).exp_()
        ctx.save_for_backward(matrix)
        return matrix

    @staticmethod
    def backward(ctx: Any, dmatrix: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        # Row j of the product sums the rows t >= j; the columns s < j of it are what counts.
        later = _upper_triangle(matrix[..., 0], 0).to(matrix.dtype) @ (dmatrix * matrix)
        return later.masked_fill_(_upper_triangle(matrix[..., 0], 0), 0.0).sum(-1)


def _upper_triangle(log_gate: Tensor, diagonal: int) -> Tensor:
    size = log_gate.shape[-1]
    return torch.ones(size, size, dtype=torch.bool, device=log_gate.device).triu(diagonal)


def chunk_coefficients(gates: Gates) -> ChunkCoefficients:
    """The coefficients of the dual form (Titans v1 section 3.2, closed form with momentum).

    gates: [..., C] each.
    """
    theta, log_retain, log_eta = gates
    size = theta.shape[-1]
    if log_retain is None:
        retained = torch.ones(size, size, dtype=theta.dtype, device=theta.device).tril()
        memory_carry = torch.ones_like(theta)
    else:
        retained = decay_matrix(log_retain)
        memory_carry = log_retain.cumsum(-1).exp()
    if log_eta is None:
        return ChunkCoefficients(memory_carry, None, retained * theta.unsqueeze(-2), None, None)
    surprise = decay_matrix(log_eta)
    start_surprise = log_eta.cumsum(-1).exp()
    return ChunkCoefficients(
        memory_carry=memory_carry,
        momentum_carry=(retained @ start_surprise.unsqueeze(-1)).squeeze(-1),
        write=(retained @ surprise) * theta.unsqueeze(-2),
        final_carry=start_surprise[..., -1],
        final_write=surprise[..., -1, :] * theta,
    )
