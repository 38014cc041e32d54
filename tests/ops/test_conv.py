"""The short convolution against its definition, and across calls."""

import torch

from everlong.ops import causal_conv
from numerics import assert_close


def test_definition_and_split():
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    weight = torch.randn(3, 4, dtype=torch.float64)
    y, tail = causal_conv(x, weight, None)
    for t in range(7):
        want = sum(weight[:, 3 - j] * x[:, t - j] for j in range(min(4, t + 1)))
        assert_close(f"y[{t}]", y[:, t], want)
    for cut in range(8):
        first, middle = causal_conv(x[:, :cut], weight, None)
        second, end = causal_conv(x[:, cut:], weight, middle)
        assert_close("split", torch.cat([first, second], 1), y)
        assert_close("tail", end, tail)
