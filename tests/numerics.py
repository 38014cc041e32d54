"""One tolerance table for every numeric comparison in the tests."""

import torch

# Relative to the largest magnitude of the wanted tensor, and absolute below 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2}


def assert_close(name, got, want, dtype=torch.float64):
    """Fail, with name and largest difference, when `got` is not `want` to the table."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if not want.numel():
        return
    scale = max(1.0, want.abs().max().item())
    difference = (got.to(torch.float64) - want.to(torch.float64)).abs().max().item() / scale
    assert difference <= TOLERANCE[dtype], (
        f"{name}: differs by {difference:.2e} of {scale:.2e}, allowed {TOLERANCE[dtype]:.0e}"
    )


def assert_states_close(name, got, want, dtype=torch.float64):
    """Compare two pytrees of tensors leaf by leaf."""
    got_leaves = torch.utils._pytree.tree_leaves(got)
    want_leaves = torch.utils._pytree.tree_leaves(want)
    assert len(got_leaves) == len(want_leaves), (
        f"{name}: {len(got_leaves)} and {len(want_leaves)} leaves"
    )
    for index, (g, w) in enumerate(zip(got_leaves, want_leaves, strict=True)):
        if isinstance(w, torch.Tensor):
            assert_close(f"{name}[{index}]", g, w, dtype)
        else:
            assert g == w, f"{name}[{index}]: {g}, want {w}"
