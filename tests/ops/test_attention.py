"""Attention in blocks against attention with a mask of all pairs."""

import pytest
import torch

from everlong.ops.attention import full_attention, sliding_attention
from numerics import assert_close


def by_pairs(q, k, v, window):
    """Softmax over all pairs, written out."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    past = k.shape[2] - q.shape[2]
    i = torch.arange(q.shape[2])[:, None] + past
    j = torch.arange(k.shape[2])
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill((j > i) | (j <= i - window), -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("tokens", [1, 4, 5, 13])
@pytest.mark.parametrize("past", [0, 1, 3, 4])
def test_sliding_window(window, tokens, past):
    past = min(past, window - 1)
    q = torch.randn(2, 4, tokens, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, past + tokens, 6, dtype=torch.float64)
    assert_close("y", sliding_attention(q, k, v, window), by_pairs(q, k, v, window))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("past", [0, 3])
def test_full(tokens, past):
    q = torch.randn(2, 4, tokens, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, past + tokens, 6, dtype=torch.float64)
    assert_close("y", full_attention(q, k, v), by_pairs(q, k, v, 1000))
