"""Self-attention over a window or over everything, with rotary positions and a cache."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from everlong.ops.attention import full_attention, sliding_attention


class AttentionState(NamedTuple):
    """Keys (rotated) and values of the tokens that later ones may still see, [B, M, S, K] each."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """Causal multi-head attention with grouped keys (Llama's), optionally in a sliding window.

    Args:
        hidden_size: width D. num_heads, num_key_value_heads: query heads and the keys they share.
        head_dim: size of a head. window: tokens each token sees, itself included; None for all.
        rope_theta: base of the rotary frequencies.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        window: int | None,
        rope_theta: float,
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.rope_theta = head_dim, window, rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, state: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState]:
        """x: [B, T, D]; positions: [B, T] or [1, T] integers. Returns y [B, T, D] and the state."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        if self.window is None:
            y, kept = full_attention(q, k, v), k.shape[2]
        else:
            y, kept = sliding_attention(q, k, v, self.window), min(self.window - 1, k.shape[2])
        start = k.shape[2] - kept
        return self.o_proj(y.transpose(1, 2).flatten(2)), AttentionState(
            k[:, :, start:], v[:, :, start:]
        )


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (Llama's halves) of x [B, N, T, K], in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    exponent = torch.arange(half, dtype=dtype, device=x.device) / half
    angles = positions.to(dtype)[:, None, :, None] * theta**-exponent
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
