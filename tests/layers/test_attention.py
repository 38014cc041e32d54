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


def test_what_two_tokens_are_to_each_other_does_not_depend_on_how_late_they_come():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 64, generator=generator) for _ in range(2))

    def score(start):
        [late], [early] = (
            rotate(torch.tensor([[start + distance]]), 10_000.0, x) for x, distance in ((q, 3), (k, 0))
        )
        return (late * early).sum()

    for start in (1_000_000, 100_000_000):
        assert (score(start) - score(0)).abs() < 1e-4
