"""Causal attention over a window, in O(T W) time and memory, and over everything.

Keys and values are those of past tokens, aligned right, and of the new ones: [B, M, S + T, K]. Rows
may hold fewer than S past tokens. `Prefix` keys are seen by every token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from everlong.ops.arguments import INTEGERS, check_one_kind, check_rank, check_shape
from everlong.ops.backend import native_takes
from everlong.ops.native.attention import CausalAttention, attention_wins
from everlong.ops.state import PerRow

Prefix = tuple[Tensor, Tensor]  # keys and values that every token sees, [B, M, P, K] each


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: PerRow | None = None,
    prefix: Prefix | None = None,
    each: int = 1,
) -> Tensor:
    """Every token sees itself, all before it and the prefix.

    q: [B, N, T, K]; k, v: [B, M, (S + T) each, K] with N a multiple of M; `each` keys belong to one
    token. past: past tokens, 0 ... S, [B] integers where rows differ; default S. prefix: keys and
    values [B, M, P, K]. Returns [B, N, T, K]. Raises ValueError when shapes do not fit.
    """
    _check(q, k, v, past, prefix, each)
    if _native_does(q, k, v, past, prefix, each, 0):
        return CausalAttention.apply(each, 0, q, k, v, *(prefix or (None, None)))
    mask = causal_mask(q, k.shape[2] // each, past, None, plain=each == 1)
    return _attend(q, k, v, None if mask is None else mask.repeat_interleave(each, -1), prefix)


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    past: PerRow | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Token i sees the `window` tokens i - window + 1 ... i, and the prefix.

    As `full_attention`, in time and memory that grow with T * window: blocks of `window` queries
    look at two blocks of keys each. window: at least 1.
    """
    _check(q, k, v, past, prefix, 1)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if _native_does(q, k, v, past, prefix, 1, window):
        return CausalAttention.apply(1, window, q, k, v, *(prefix or (None, None)))
    tokens = q.shape[2]
    slots = k.shape[2] - tokens
    first = min(window, tokens)
    begin = slice(slots + first)
    head = q[:, :, :first]
    mask = causal_mask(head, slots + first, past, window)
    y = _attend(head, k[:, :, begin], v[:, :, begin], mask, prefix)
    if tokens == first:
        return y
    blocks = -(-(tokens - first) // window)
    pad = (0, 0, 0, blocks * window - tokens + first)
    # From the second block on no query sees a past token: one mask serves them all.
    q = F.pad(q[:, :, first:], pad).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    k, v = (
        F.pad(x[:, :, slots:], pad).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for x in (k, v)
    )
    if prefix is not None:
        prefix = (prefix[0].repeat_interleave(blocks, 0), prefix[1].repeat_interleave(blocks, 0))
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)
    rest = _attend(q, k, v, (column > row) & (column <= row + window), prefix)
    rest = rest.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)
    return torch.cat([y, rest[:, :, : tokens - first]], 2)


def _check(
    q: Tensor, k: Tensor, v: Tensor, past: PerRow | None, prefix: Prefix | None, each: int
) -> None:
    """Refuse what does not fit, before any work."""
    check_rank("q", q, "B, N, T, K")
    check_rank("k", k, "B, M, S + T, K")
    batch, heads, tokens, size = q.shape
    shared, keys = k.shape[1:3]
    if not size or not shared or heads % shared or each < 1 or keys % each or keys < tokens * each:
        raise ValueError(
            "q [B, N, T, K] and k [B, M, (S + T) each, K] must have N a multiple of M, S >= 0, K >= 1, "
            f"got {list(q.shape)} and {list(k.shape)} with each = {each}"
        )
    check_shape("k", k, "B, M, (S + T) each, K", (batch, shared, keys, size))
    check_shape("v", v, "B, M, (S + T) each, K", (batch, shared, keys, size))
    check_one_kind(q=q, k=k, v=v)
    if prefix is not None:
        check_rank("the prefix's keys", prefix[0], "B, M, P, K")
        for x in prefix:
            shape = (batch, shared, prefix[0].shape[2], size)
            check_shape("the prefix's keys and values", x, "B, M, P, K", shape)
    if past is not None:
        _check_past(past, batch, keys // each - tokens)


def _check_past(past: PerRow, batch: int, slots: int) -> None:
    if isinstance(past, Tensor):
        fits = past.dtype in INTEGERS and past.shape == (batch,)
    else:
        fits = 0 <= past <= slots
    if not fits:
        raise ValueError(
            f"past must be an integer in 0 ... {slots} or [B] = [{batch}] of them, got {past}"
        )


def _native_does(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: PerRow | None,
    prefix: Prefix | None,
    each: int,
    window: int,
) -> bool:
    """Whether the native code takes it: all past slots hold a token, and blocks' scores stay small."""
    whole = past is None or (isinstance(past, int) and past == k.shape[2] // each - q.shape[2])
    return whole and native_takes(q, k, v, *(prefix or ())) and attention_wins(k, window)


def causal_mask(
    q: Tensor, keys: int, past: PerRow | None, window: int | None, plain: bool = True
) -> Tensor | None:
    """Which of the S + T keys each query sees: [T, S + T] or [B, 1, T, S + T].

    None where one token sees all of them, or (`plain`) the mask is that of causal attention.
    """
    tokens = q.shape[2]
    slots = keys - tokens
    whole = past is None or (isinstance(past, int) and past == slots)
    if whole and (window is None or keys <= window) and (tokens == 1 or (plain and not slots)):
        return None
    row = torch.arange(slots, keys, device=q.device)[:, None]
    column = torch.arange(keys, device=q.device)
    mask = column <= row
    if window is not None:
        mask &= column > row - window
    if past is None or whole:
        return mask
    held = past.to(q.device).view(-1, 1, 1, 1) if isinstance(past, Tensor) else past
    return mask & (column >= slots - held)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, prefix: Prefix | None) -> Tensor:
    """Attention under a mask of k, or (mask None) plain causal attention."""
    if prefix is None and mask is None:
        causal = True if q.shape[2] > 1 else False  # noqa: SIM210 (a compiler's sizes are symbols)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    if prefix is not None:
        seen = prefix[0].shape[2]
        if mask is None and q.shape[2] > 1:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        k, v = (torch.cat([p.to(x.dtype), x], 2) for p, x in zip(prefix, (k, v), strict=True))
        mask = None if mask is None else F.pad(mask, (seen, 0), value=True)
    if mask is not None and mask.dim() == 2:
        mask = mask[None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
