"""Self-attention over a window, a segment or everything, with rotary positions and a cache."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from everlong.layers.weight import Layer
from everlong.ops.arguments import check_rank, check_shape
from everlong.ops.attention import Prefix, full_attention, sliding_attention
from everlong.ops.backend import native_takes
from everlong.ops.native.library import intercepted
from everlong.ops.native.rows import Rotate
from everlong.ops.state import (
    ANOTHER,
    PerRow,
    State,
    agreed,
    check_kind,
    check_position,
    check_tensor,
    check_tuple,
)

MOST_KEPT = 4096  # tokens of the rotary tables that are kept for the next layer


@dataclass(frozen=True)
class AttentionState(State):
    """What later tokens may still see.

    keys (rotated), values: [B, M, S, K], each row's own tokens aligned right. position: tokens of the
    document (of the open segment) so far, an integer or [B]. prefix: keys and values that every token
    sees, [B, M, P, K] each, or None.
    """

    keys: Tensor
    values: Tensor
    position: PerRow
    prefix: Prefix | None

    def check_fields(self) -> None:
        """Raise ValueError where the fields do not fit each other."""
        check_tensor("keys", self.keys, (None,) * 4)
        batch, heads, _, size = self.keys.shape
        device = self.keys.device
        check_tensor("values", self.values, tuple(self.keys.shape), device)
        if self.prefix is not None:
            check_tuple("prefix", self.prefix, 2)
            check_tensor("prefix.0", self.prefix[0], (batch, heads, None, size), device)
            check_tensor("prefix.1", self.prefix[1], tuple(self.prefix[0].shape), device)
        check_position(self.position, batch)

    @property
    def place(self) -> PerRow:
        """Tokens so far."""
        return self.position

    def check_like(self, initial: "AttentionState") -> None:
        """As of every state; there may be any number of keys."""
        check_tensor("keys", self.keys, (None, initial.keys.shape[1], None, initial.keys.shape[3]))
        super().check_like(replace(initial, keys=self.keys, values=self.values))

    def check_slots(self, held: PerRow, each: int = 1) -> None:
        """Raise ValueError unless there are keys of the `held` tokens that a next one may see."""
        if isinstance(held, Tensor) and (torch.compiler.is_compiling() or not len(held)):
            return
        want = each * int(held.max() if isinstance(held, Tensor) else held)
        if self.keys.shape[2] < want:
            raise ValueError(
                f"the state's keys are of {self.keys.shape[2]} rows but its position {self.position} "
                f"needs {want}: {ANOTHER}"
            )

    def restart(self, fresh: Tensor, initial: "AttentionState") -> "AttentionState":
        """The state with `initial` in the rows where `fresh` [B] (on the CPU) holds."""
        # What a row sees is counted by its position; but a key that is not finite would show.
        none = replace(initial, keys=torch.zeros_like(self.keys), values=torch.zeros_like(self.values))
        return super().restart(fresh, none)

    def keep(
        self,
        k: Tensor,
        v: Tensor,
        position: PerRow,
        lengths: Tensor | None,
        most: int | None = None,
        each: int = 1,
    ) -> "AttentionState":
        """The state at `position`, with as many of the last tokens of each row: `most` at most.

        k, v: [B, M, (S + T) each, K], `each` rows a token, those of this state and of T new tokens;
        lengths: [B] on the CPU, how many of the new ones are real (None: all).
        """
        bound = position if most is None else _at_most(position, most)
        kept = each * (int(bound.max()) if isinstance(bound, Tensor) else bound)
        if lengths is None:
            start = k.shape[2] - kept
            # A copy, or a few kept keys would hold the memory of all.
            keys, values = (x[:, :, start:].clone() if start else x for x in (k, v))
        else:
            end = self.keys.shape[2] + lengths * each
            index = (end[:, None] - kept + torch.arange(kept, device="cpu")).clamp(min=0)
            index = index.to(k.device)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            keys, values = k.gather(2, index), v.gather(2, index)
        return replace(self, keys=keys, values=values, position=position).known_right()

    @classmethod
    def join(cls, states: Sequence["AttentionState"]) -> "AttentionState":
        """The rows of several states, one behind the other."""
        slots = max(state.keys.shape[2] for state in states)

        def wide(x: Tensor) -> Tensor:
            return nn.functional.pad(x, (0, 0, slots - x.shape[2], 0))

        return super().join(
            [replace(state, keys=wide(state.keys), values=wide(state.values)) for state in states]
        )


register_dataclass(AttentionState)


class Attention(Layer):
    """Causal multi-head attention with grouped keys (Llama's).

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
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.window, self.rope_theta = window, rope_theta
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def initial_state(self, like: Tensor, prefix: Tensor | None = None) -> AttentionState:
        """The state of one row before its first token, in the type and on the device of `like`.

        prefix: [1, P, D] rows that every token sees.
        """
        none = like.new_zeros(1, self.num_key_value_heads, 0, self.head_dim)
        seen = None
        if prefix is not None:
            seen = (self._heads(self.k_proj, prefix), self._heads(self.v_proj, prefix))
        return AttentionState(none, none, 0, seen)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        """x: [B, T, D]; lengths: [B] on the CPU, the real tokens of each row (default: all).

        Returns y [B, T, D] and the state to go on from. Raises ValueError when the state does not fit.
        """
        state = self._checked(state, x)
        q, k, v = (self._heads(each, x) for each in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._rotated(state, q, k)
        k, v = join_keys(state.keys, k), join_keys(state.values, v)
        past = state.position
        if self.window is None:
            y = full_attention(q, k, v, past, state.prefix)
        else:
            past = _at_most(past, self.window - 1)
            y = sliding_attention(q, k, v, self.window, past, state.prefix)
        position = agreed(state.position + (x.shape[1] if lengths is None else lengths))
        most = None if self.window is None else self.window - 1
        return self._out(y), state.keep(k, v, position, lengths, most)

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """[B, T, D] as heads [B, N, T, K]."""
        return self._split(projection(x))

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, N K] as heads [B, N, T, K]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _out(self, y: Tensor) -> Tensor:
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _rotated(self, state: AttentionState, *rows: Tensor) -> list[Tensor]:
        """Rows [B, ., T, K] of the tokens behind the state, at their positions."""
        tables = rotary_tables(
            state.position, rows[0].shape[2], self.rope_theta, self.head_dim // 2, rows[0]
        )
        return rotate(*tables, *rows)

    def _checked(self, state: AttentionState | None, x: Tensor) -> AttentionState:
        """The state, or an empty one; refuses what is not this layer's."""
        if state is None:
            return self.initial_state(x).expand(x.shape[0])
        check_kind("attention", state, AttentionState)
        state.check()
        state.check_batch(x.shape[0])
        got = list(state.keys.shape[1::2])
        want = [self.num_key_value_heads, self.head_dim]
        if got != want:
            raise ValueError(
                f"state was built with key heads and size {got} but the layer has {want}: it belongs "
                "to another layer or model"
            )
        self.check_place(state)
        return state

    def check_place(self, state: AttentionState) -> None:
        """Refuse a state without the keys that its position promises."""
        held = state.position
        state.check_slots(held if self.window is None else _at_most(held, self.window - 1))


class SegmentAttention(Attention):
    """Attention inside segments of `segment` tokens, each with a row of the memory beside it (MAC).

    Token i of a segment sees the prefix, and of its segment x_j and h_j for j <= i: causal attention
    over [prefix, h_1, x_1, h_2, x_2, ...]. Positions start anew in each segment; h_j has x_j's.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        segment: int,
        rope_theta: float,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_key_value_heads, head_dim, None, rope_theta)
        self.segment = segment

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens x [B, T, D], not yet rotated: [B, T, . K]."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(
        self,
        rows: Sequence[Tensor],
        h: Tensor,
        state: AttentionState,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """rows: what `project` makes of tokens, and h: [B, T, D], their rows of the memory; in each row
        of the batch no more tokens than its open segment has left.

        Returns y [B, T, D] and the state, a new segment's where one is full.
        """
        state = self._checked(state, h)
        q, k, v = map(self._split, rows)
        memory_k, memory_v = self._heads(self.k_proj, h), self._heads(self.v_proj, h)
        q, k, memory_k = self._rotated(state, q, k, memory_k)
        k = join_keys(state.keys, torch.stack([memory_k, k], 3).flatten(2, 3))
        v = join_keys(state.values, torch.stack([memory_v, v], 3).flatten(2, 3))
        y = full_attention(q, k, v, state.position, state.prefix, each=2)
        position = agreed(
            (state.position + (h.shape[1] if lengths is None else lengths)) % self.segment
        )
        return self._out(y), state.keep(k, v, position, lengths, each=2)

    def check_place(self, state: AttentionState) -> None:
        """As for all attention; the position is one in the open segment."""
        check_position(state.position, state.batch_size, self.segment)
        state.check_slots(state.position, each=2)

    def over_prefix(self, prefix: Tensor) -> Tensor:
        """The outputs of prefix rows [1, P, D] that see each other and nothing else."""
        q, k, v = (self._heads(each, prefix) for each in (self.q_proj, self.k_proj, self.v_proj))
        return self._out(nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def rotate(cos: Tensor, sin: Tensor, *rows: Tensor) -> list[Tensor]:
    """Rotary position embedding (Llama's halves) of rows [B, ., T, K] by `rotary_tables`.

    Raises ValueError when shapes do not fit.
    """
    check_rank("cos", cos, "B or 1, 1, T, K / 2")
    check_shape("sin", sin, "B or 1, 1, T, K / 2", cos.shape)
    batch, one, tokens, half = cos.shape
    for x in rows:
        check_rank("rows", x, "B, N, T, K")
        if one != 1 or batch not in (1, x.shape[0]) or x.shape[2:] != (tokens, 2 * half):
            raise ValueError(
                "cos and sin must be [B or 1, 1, T, K / 2] for rows [B, N, T, K], got "
                f"{list(cos.shape)} for {list(x.shape)}"
            )
    constant = not (cos.requires_grad or sin.requires_grad)
    if constant and native_takes(cos, sin, *rows):
        return [Rotate.apply(x, cos, sin) for x in rows]
    rotated = []
    for x in rows:
        left, right = x[..., :half], x[..., half:]
        rotated.append(torch.cat([left * cos - right * sin, right * cos + left * sin], -1))
    return rotated


def rotary_tables(
    start: PerRow, tokens: int, theta: float, half: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, 1, tokens, half] of the angles at positions start ... start + tokens - 1, in
    the type and on the device of `like`.

    The angles are float64 where a device has it: in float32 those of neighbours a million tokens into
    a text are off by 0.06, ten million tokens by half a radian.
    """
    # What is made under a mode or a transformation may be no tensor with numbers, and must not be kept.
    keeps = not torch.compiler.is_compiling() and not intercepted()
    if keeps and isinstance(start, int) and tokens <= MOST_KEPT:
        return _agreed_tables(start, tokens, theta, half, like.dtype, like.device)
    return _tables(start, tokens, theta, half, like.dtype, like.device)


@functools.lru_cache(maxsize=2)
def _agreed_tables(start: int, *more: Any) -> tuple[Tensor, Tensor]:
    """Every layer asks for the same ones. They serve in training too, whoever asked first."""
    with torch.inference_mode(False):
        return _tables(start, *more)


def _tables(
    start: PerRow, tokens: int, theta: float, half: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if device.type == "mps" else torch.float64
    # An integer stays one, or a compiler takes each for a constant of a program of its own.
    first = start.to(device).view(-1, 1) if isinstance(start, Tensor) else start
    positions = torch.arange(tokens, device=device)[None] + first
    exponent = torch.arange(half, dtype=wide, device=device) / half
    angles = positions.to(wide)[:, None, :, None] * theta**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def join_keys(past: Tensor, new: Tensor) -> Tensor:
    """Keys or values of past tokens, and of new ones behind them."""
    return torch.cat([past.to(new.dtype), new], 2) if past.shape[2] else new


def _at_most(number: PerRow, bound: int) -> PerRow:
    return number.clamp(max=bound) if isinstance(number, Tensor) else min(number, bound)
