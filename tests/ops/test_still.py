"""Chunks in which nothing is written: the native scan reads them and does nothing else."""

from itertools import pairwise

import pytest
import torch

from everlong.ops import NeuralMemoryState, chunk_neural_memory, use_backend
from numerics import assert_close


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_still_chunks_equal_those_that_write_nothing(depth, decay, momentum):
    """Still chunks before, between and behind writing ones, of some rows and heads alone."""
    torch.manual_seed(0)
    batch, heads, size, chunk, chunks = 2, 2, 6, 5, 40
    widths = [size, *[9] * (depth - 1), size]
    weights = [torch.randn(batch, heads, *pair) for pair in pairwise(widths)]
    q, k, v = torch.randn(3, batch, chunk * chunks, heads, size).double()
    theta = 0.01 * torch.rand(batch, chunk * chunks, heads, depth)
    theta[:, 3 * chunk :] = 0
    theta[0, 7 * chunk + 2, 1] = 0.02
    theta[1, 30 * chunk :, 0] = 0.02
    gates = [theta, -0.1 * torch.rand_like(theta) if decay else None, None]
    if momentum:
        gates[2] = -40 * torch.rand_like(theta)  # S is soon zero
    gates = [None if gate is None else gate.double() for gate in gates]
    state = NeuralMemoryState.initial(
        [w.double() for w in weights], chunk, momentum=momentum, decay=decay
    )
    scale = torch.rand(heads, size).double()
    with torch.no_grad():
        y, after = chunk_neural_memory(q, k, v, *gates, state=state, scale=scale)
        with use_backend("eager"):
            want, wanted = chunk_neural_memory(q, k, v, *gates, state=state, scale=scale)
    assert_close("y", y, want)
    for name, x in after.tensors().items():
        assert_close(name, x, wanted.tensors()[name])
