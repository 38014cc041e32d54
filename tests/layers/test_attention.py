"""Rotary positions (attention itself is tested in tests/ops and in the blocks' laws)."""

import torch

from everlong.layers.attention import rotate


def test_rotary_angles_do_not_round_with_the_rows():
    """Late positions in half precision: bfloat16 has no number between 1000 and 1004."""
    positions = torch.arange(1000, 1008)[None]
    x = torch.ones(1, 1, 8, 16, dtype=torch.float64)
    [want] = rotate(positions, 10_000.0, x)
    [got] = rotate(positions, 10_000.0, x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() < 0.02
