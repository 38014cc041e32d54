"""Rotary positions (attention itself is tested in tests/ops and in the blocks' laws)."""

import pytest
import torch

from everlong.layers.attention import rotary_tables, rotate
from everlong.ops import use_backend


def rotated(x, start):
    tables = rotary_tables(start, x.shape[2], 10_000.0, x.shape[-1] // 2, x)
    return rotate(*tables, x)[0]


def test_rotary_angles_do_not_round_with_the_rows():
    """Late positions in half precision: bfloat16 has no number between 1000 and 1004."""
    x = torch.ones(1, 1, 8, 16, dtype=torch.float64)
    got = rotated(x.bfloat16(), 1000)
    assert got.dtype == torch.bfloat16
    assert (got.double() - rotated(x, 1000)).abs().max() < 0.02


def test_what_two_tokens_are_to_each_other_does_not_depend_on_how_late_they_come():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 64, generator=generator) for _ in range(2))

    def score(start):
        return (rotated(q, start + 3) * rotated(k, start)).sum()

    for start in (1_000_000, 100_000_000):
        assert (score(start) - score(0)).abs() < 1e-4


@pytest.mark.parametrize("start", [5, torch.tensor([3, 9])])
def test_rows_turn_by_their_own_angles(start):
    """Against complex numbers, which rotate by being multiplied; any back end, forward and back."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64, generator=generator, requires_grad=True)
    dy = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    positions = torch.as_tensor(start).view(-1, 1) + torch.arange(7)
    angles = positions[:, None, :, None] * 10_000.0 ** -(torch.arange(5).double() / 5)
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.polar(torch.ones_like(angles), angles)
    want = torch.cat([turned.real, turned.imag], -1)
    [dwant] = torch.autograd.grad((want * dy).sum(), x)
    for backend in ("eager", "auto"):
        with use_backend(backend):
            y = rotated(x, start)
            assert torch.allclose(y, want, atol=1e-12)
            assert torch.allclose(torch.autograd.grad((y * dy).sum(), x)[0], dwant, atol=1e-12)
