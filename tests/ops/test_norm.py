"""Unit length and unit root mean square: values, gradients, zeros, half precision."""

import torch

from everlong.ops import rms_norm, sigmoid_gate, swiglu, unit_length, unit_rms
from numerics import assert_close


def test_rows_have_unit_length_and_gradients():
    x = torch.randn(1, 7, 2, 4, dtype=torch.float64, requires_grad=True)
    assert_close(
        "length",
        unit_length(x * 1e4).norm(dim=-1),
        torch.ones(1, 7, 2, dtype=torch.float64),
        torch.float32,
    )
    assert torch.autograd.gradcheck(unit_length, [x])


def test_rms_is_one_and_has_gradients():
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    want = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    assert_close("rms", unit_rms(x, 0.1), want)
    assert torch.autograd.gradcheck(lambda x: unit_rms(x, 0.1), [x])


def test_zero_stays_finite():
    assert not unit_length(torch.zeros(1, 4)).isnan().any()


def test_half_precision_is_computed_in_float32():
    x = 300 * torch.ones(1, 4, dtype=torch.float16)  # whose squares overflow
    assert_close("unit", unit_length(x), torch.full((1, 4), 0.5), torch.bfloat16)


def rows_of(count):
    generator = torch.Generator().manual_seed(0)
    return [
        (3 * torch.randn(4, 7, 10, dtype=torch.float64, generator=generator)).requires_grad_()
        for _ in range(count)
    ]


def test_gates_and_their_gradients():
    gate, x = rows_of(2)
    assert_close("swiglu", swiglu(gate, x), torch.nn.functional.silu(gate) * x)
    assert_close("sigmoid", sigmoid_gate(gate, x), torch.sigmoid(gate) * x)
    assert torch.autograd.gradcheck(swiglu, [gate, x])
    assert torch.autograd.gradcheck(sigmoid_gate, [gate, x])


def test_norm_with_weight_and_gate():
    x, gate = rows_of(2)
    weight = torch.linspace(-1, 2, 10, dtype=torch.float64).requires_grad_()
    plain = weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert_close("norm", rms_norm(x, weight, 1e-3), plain)
    gated = rms_norm(x, weight, 1e-3, gate)
    assert_close("gated", gated, plain * torch.nn.functional.silu(gate))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-3), [x, weight])
    assert torch.autograd.gradcheck(lambda x, w, g: rms_norm(x, w, 1e-3, g), [x, weight, gate])


def test_a_gate_of_extremes_stays_finite():
    extremes = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30], requires_grad=True)
    y = swiglu(extremes, torch.ones(5)) + sigmoid_gate(extremes, torch.ones(5))
    y.sum().backward()
    assert y.isfinite().all()
    assert extremes.grad.isfinite().all()
