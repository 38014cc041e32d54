"""Reading a text token by token, and what is kept of it."""

from typing import Any


def decode(model: Any, cache: Any, ids: Any) -> Any:
    """Read ids [B, T] token by token, as generation does; the cache to go on from."""
    for token in ids.split(1, 1):
        cache = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def bytes_of(cache: Any) -> int:
    """What a cache of everlong or of `transformers` keeps in memory, each piece once."""
    from torch.utils._pytree import tree_leaves

    kept = {}
    for layer in cache.layers:
        held = [layer.state] if hasattr(layer, "state") else [layer.keys, layer.values]
        for leaf in tree_leaves(held):
            if hasattr(leaf, "untyped_storage"):
                storage = leaf.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
    return sum(kept.values())


def memory_now(device: str) -> int:
    """Resident bytes of this process, or allocated ones of the GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
