"""What `transformers` passes to any model besides `forward`'s own arguments, and what it asks of
`generate` with a cache: understood as there, or refused by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everlong.models.cache import MemoryCache
from everlong.words import nearest

LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# What these ask for, other than by a value of no effect, no model here has.
ABSENT = {
    "output_attentions": "a memory has no attention weights (output_memory=True says what it did)",
    "output_router_logits": "there are no experts",
    "token_type_ids": "tokens have no types",
}
# cache_position: where a cache stands it says itself.
KNOWN = {*LOSS, *PACKED, *ABSENT, "is_causal", "cache_position", "return_dict"}


def check_keywords(model: Any, given: Mapping[str, Any], hidden_states: Any) -> None:
    """Refuse, with a ValueError, keywords of `forward` that no model has or that ask for what ours do
    not give. hidden_states: what `output_hidden_states` is."""
    for name in given.keys() - KNOWN:
        own = set(inspect.signature(type(model).forward).parameters) - {"self", "kwargs"}
        raise ValueError(f"unknown argument {name}{nearest(name, own | KNOWN)}")
    if not (hidden_states is None or isinstance(hidden_states, bool)):
        raise ValueError(f"output_hidden_states is True or False, got {hidden_states!r}")
    asked = {**given}
    if asked.get("output_attentions") is None:
        asked["output_attentions"] = model.config.output_attentions
    for name, why in ABSENT.items():
        value = asked.get(name)
        if bool(value.any()) if isinstance(value, Tensor) else value:
            raise ValueError(f"{name} is not understood: {why}; leave it out")
    if asked.get("is_causal") is False:
        raise ValueError("is_causal=False: no token of these models sees a later one; leave it out")


def document_starts(
    positions: Tensor | None, given: Mapping[str, Any], x: Tensor, cache: Any
) -> Tensor | None:
    """position_ids [B, T] for rows x [B, T, D], 0 where a document starts, of what says where they do.

    given: cu_seq_lens_q [documents + 1], the offsets in a single row at which documents start and the
    last ends; seq_idx [B, T], the number of each token's document. Raises ValueError where two of them
    differ.
    """
    batch, tokens = x.shape[:2]
    told: dict[str, Tensor] = {}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if given.get(name) is not None:
            told[name] = _starts_at(torch.as_tensor(given[name], device="cpu"), name, batch, tokens)
    index = given.get("seq_idx")
    if index is not None:
        index = torch.as_tensor(index, device="cpu")
        if list(index.shape) != [batch, tokens]:
            raise ValueError(f"seq_idx must be [B, T] = {[batch, tokens]}, got {list(index.shape)}")
        first = torch.ones(batch, min(tokens, 1), dtype=torch.bool, device=index.device)
        told["seq_idx"] = torch.cat([first, index[:, 1:] != index[:, :-1]], 1)
    if not told:
        return positions
    if isinstance(cache, MemoryCache) and cache.get_seq_length():
        raise ValueError(
            f"{', '.join(told)} with a cache that has read something: whether the first document goes "
            "on is not said; leave them out and give position_ids, 0 where a document starts"
        )
    if positions is not None:
        told["position_ids"] = (positions == 0).expand(batch, -1)
    first_name, *others = told
    starts = told[first_name].to(x.device)
    for name in others:
        if not torch.equal(told[name].to(x.device), starts):
            raise ValueError(
                f"{first_name} and {name} let documents start at different tokens: leave one out"
            )
    return (~starts).long()


def _starts_at(offsets: Tensor, name: str, batch: int, tokens: int) -> Tensor:
    """[1, T], where documents start in the one row."""
    ends = offsets.tolist()
    if not isinstance(ends, list) or offsets.is_floating_point():
        raise ValueError(f"{name} must be a row of integers, got {ends}")
    if batch != 1 or ends[:1] != [0] or ends[-1] != tokens or sorted(ends) != ends:
        raise ValueError(
            f"{name} must be offsets from 0 to T = {tokens} in a single row, in their order, got "
            f"{ends} for {batch} rows"
        )
    starts = torch.zeros(1, tokens, dtype=torch.bool, device="cpu")
    starts[0, [each for each in ends if each < tokens]] = True
    return starts


def mask_behind(cache: MemoryCache, ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The attention_mask for `generate` behind what a cache has read.

    As in `transformers`, ids [B, T] are the new tokens alone where the mask has columns for those that
    were read, and else the whole text, of which the cache has read the beginning. Ids that can only be
    new, as they are fewer than were read, are taken as such; where they could be either, and do not go
    on as the text that was read ended, that raises ValueError.
    """
    past = cache.get_seq_length()
    if not past:
        return mask
    if ids is None:
        raise ValueError(
            "past_key_values go on with input_ids: read embeddings by "
            "model(inputs_embeds=..., past_key_values=...) first, and give the last token as input_ids"
        )
    batch, tokens = ids.shape
    if mask is not None and mask.shape[1] != tokens:
        return mask
    if tokens < past:
        new = torch.ones_like(ids) if mask is None else mask
        return torch.cat([new.new_ones(batch, past), new], 1)
    tail = ids[:, :0] if cache.tail is None else cache.tail.to(ids.device)
    end = tail.shape[1]
    if end and tokens > past and torch.equal(ids[:, past - end : past], tail):
        return mask
    raise ValueError(
        f"past_key_values have read {past} tokens and input_ids are {tokens}, but not those and more: "
        "where they are new tokens alone say generate_from(past_key_values, input_ids), where they are "
        f"the whole text generate_from(past_key_values, input_ids[:, {past}:])"
    )
