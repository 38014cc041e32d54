"""A long text in constant memory."""

import psutil
import torch
from torch.utils import _pytree as pytree

from subjects import titans

TOKENS, WARM, PIECE = 200_000, 10_000, 1_000
SLACK = 4 * 2**20  # bytes: what an allocator may keep, far below 190,000 tokens of anything


def test_200_000_tokens_leave_resident_memory_flat_and_the_state_finite():
    torch.manual_seed(0)
    model = titans("lmm", "lmm", hidden_size=32, intermediate_size=64, chunk_size=32)().eval()
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
    for leaf in pytree.tree_leaves([layer.state for layer in cache.layers]):
        assert leaf is None or leaf.isfinite().all()
