"""The short convolution against its definition, across calls, and its gradients."""

import pytest
import torch
from torch.nn.functional import silu

from everlong.ops import causal_conv_silu
from numerics import assert_close


def test_definition_and_split():
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    weight = torch.randn(3, 4, dtype=torch.float64)
    y, tail = causal_conv_silu(x, weight, None)
    for t in range(7):
        want = silu(sum(weight[:, 3 - j] * x[:, t - j] for j in range(min(4, t + 1))))
        assert_close(f"y[{t}]", y[:, t], want)
    for cut in range(8):
        first, middle = causal_conv_silu(x[:, :cut], weight, None)
        second, end = causal_conv_silu(x[:, cut:], weight, middle)
        assert_close("split", torch.cat([first, second], 1), y)
        assert_close("tail", end, tail)


@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
def test_gradients(tokens):
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((2, tokens, 3), (3, 4), (2, 3, 3))]
    assert torch.autograd.gradcheck(causal_conv_silu, [x.requires_grad_() for x in inputs])
