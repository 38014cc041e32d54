"""A long text in constant memory."""

import psutil
import pytest
import torch

from subjects import titans

TOKENS, WARM, PIECE = 200_000, 10_000, 1_000
SLACK = 4 * 2**20  # bytes: what an allocator may keep, far below 190,000 tokens of anything


@pytest.mark.parametrize(
    "kind", ["lmm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mac", "mag", "mal"))]
)
def test_200_000_tokens_leave_resident_memory_flat_and_the_state_finite(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "sliding_window": 64, "segment_length": 64}
    model = titans(kind, kind, chunk_size=32, **sizes)().eval()
    process = psutil.Process()
    resident, cache = [], None
    with torch.inference_mode():
        for start in range(0, TOKENS, PIECE):
            ids = torch.randint(11, (1, PIECE))
            cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            if start + PIECE >= WARM:
                resident.append(process.memory_info().rss)
    assert max(resident) - resident[0] < SLACK, (
        f"grew by {(max(resident) - resident[0]) / 2**20:.1f} MiB"
    )
    assert cache.get_seq_length() == TOKENS
    for layer in cache.layers:
        assert all(x.isfinite().all() for x in layer.state.tensors().values())
