"""Causal attention over a window, in O(T W) time and memory, and over everything."""

import torch
import torch.nn.functional as F
from torch import Tensor


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of T queries over the last T of S >= T keys and all before them.

    q: [B, N, T, K]; k, v: [B, M, S, K] with N a multiple of M. Returns [B, N, T, K].
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys or queries == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def sliding_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention in which token i sees the `window` tokens i - window + 1 ... i.

    q: [B, N, T, K]; k, v: [B, M, S, K], the last T of them beside the queries and at most
    window - 1 before those. Returns [B, N, T, K]. Blocks of `window` queries look at two blocks of
    keys each, so time and memory grow with T * window, on every device.
    """
    batch, _, tokens, _ = q.shape
    past = k.shape[2] - tokens
    if past + tokens <= window or tokens == 1:
        return full_attention(q, k[:, :, -window:], v[:, :, -window:])
    blocks = -(-tokens // window)
    after = blocks * window - tokens
    # Keys start one whole window before the first query, so that block b's are two blocks in a row.
    k, v = (F.pad(x, (0, 0, window - past, after)) for x in (k, v))
    q = F.pad(q, (0, 0, 0, after)).unflatten(2, (blocks, window))
    k, v = (x.unfold(2, 2 * window, window).transpose(-1, -2) for x in (k, v))
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)
    mask = (column > row) & (column <= row + window)
    mask = mask.expand(blocks, -1, -1).clone()
    mask[0] &= column >= window - past
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2).flatten(0, 1),
        k.transpose(1, 2).flatten(0, 1),
        v.transpose(1, 2).flatten(0, 1),
        attn_mask=mask.repeat(batch, 1, 1).unsqueeze(1),
        enable_gqa=True,
    )
    return y.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]
