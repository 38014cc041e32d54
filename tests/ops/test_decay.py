"""Cumulative decays against the products they stand for."""

import torch

from everlong.ops.decay import Gates, chunk_coefficients, decay_matrix
from numerics import assert_close


def test_decay_matrix_is_the_product():
    gates = torch.rand(6, dtype=torch.float64)
    matrix = decay_matrix(gates.log())
    for t in range(6):
        for s in range(6):
            want = gates[s + 1 : t + 1].prod() if s <= t else torch.zeros((), dtype=torch.float64)
            assert_close(f"{t},{s}", matrix[t, s], want)


def test_a_strong_decay_keeps_the_digits_of_what_follows():
    """Differences of one running sum would lose them: 1e6 + 0.1 has no digits of 0.1 in float32."""
    log_gate = torch.tensor([-1e6, -0.1, -0.1])
    assert_close("after", decay_matrix(log_gate)[2, 0], torch.tensor(-0.2).exp(), torch.float32)


def test_gradient_is_finite_where_gates_vanish():
    log_gate = torch.tensor([-1e8, -1e30, -0.5, -3e38], requires_grad=True)
    coefficients = chunk_coefficients(Gates(torch.rand(4), log_gate, log_gate))
    loss = sum(x.sum() for x in coefficients)
    (grad,) = torch.autograd.grad(loss, log_gate)
    assert all(x.isfinite().all() for x in coefficients)
    assert grad.isfinite().all()


def test_coefficients_step_by_step():
    generator = torch.Generator().manual_seed(0)
    theta, retain, eta = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    got = chunk_coefficients(Gates(theta, retain.log(), eta.log()))
    # M_t and S_t are linear in (M_0, S_0, u_1 ... u_5): follow those seven coordinates.
    memory, momentum = torch.zeros(2, 7, dtype=torch.float64)
    memory[0], momentum[1] = 1, 1
    for t in range(5):
        momentum = eta[t] * momentum
        momentum[2 + t] -= theta[t]
        memory = retain[t] * memory + momentum
        assert_close("a", got.memory_carry[t], memory[0])
        assert_close("b", got.momentum_carry[t], memory[1])
        assert_close("write", got.write[t], memory[2:])
    assert_close("final carry", got.final_carry, momentum[1])
    assert_close("final write", got.final_write, momentum[2:])
