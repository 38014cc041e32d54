"""Unit length and unit root mean square: values, gradients, zeros, half precision."""

import torch

from everlong.ops import unit_length, unit_rms
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
