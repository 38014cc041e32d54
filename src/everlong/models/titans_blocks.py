"""The token mixers of Titans, one class each (v1 section 4), and the attention they compare with.

A block reads x [B, T, D] from where its state stopped: any number of tokens, in rows of their own
lengths. P persistent rows, learned, stand at the start of every document: the memory absorbs them
as a piece of its own before the first token, and attention always sees them. With both sides of a
gate normed, y * silu(m) is written y (x) m (or y * sigmoid(m): `gate_act`).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from everlong.layers import (
    Attention,
    AttentionState,
    NeuralMemory,
    RMSNorm,
    SegmentAttention,
    Weight,
)
from everlong.models.configuration_titans import TitansConfig
from everlong.models.stateful import BlockOutput, begin, join_pieces
from everlong.ops import NeuralMemoryState, sigmoid_gate, swiglu
from everlong.ops.documents import Cuts
from everlong.ops.state import (
    ANOTHER,
    PerRow,
    State,
    check_tensor,
    check_tuple,
    choose,
)


@dataclass(frozen=True)
class MemoryAndAttentionState(State):
    """A memory and an attention side by side (MAG, MAL)."""

    memory: NeuralMemoryState
    attention: AttentionState

    def check_fields(self) -> None:
        """Raise ValueError where the fields do not fit each other."""
        self.check_part("memory", NeuralMemoryState)
        self.check_part("attention", AttentionState)

    @property
    def place(self) -> PerRow:
        """The attention's."""
        return self.attention.place


@dataclass(frozen=True)
class MACState(State):
    """memory and attention of the open segment; `weights` [B, H, in, out] per layer: the memory at
    the segment's start, which its tokens read; `read_tail`: of the convolution before that read."""

    memory: NeuralMemoryState
    attention: AttentionState
    weights: tuple[Tensor, ...]
    read_tail: Tensor | None

    def check_fields(self) -> None:
        """Raise ValueError where the fields do not fit each other."""
        self.check_part("memory", NeuralMemoryState)
        self.check_part("attention", AttentionState)
        like, tail = self.memory.weights, self.memory.conv_tail
        check_tuple("weights", self.weights, len(like))
        for i, (x, weight) in enumerate(zip(self.weights, like, strict=True)):
            check_tensor(f"weights.{i}", x, tuple(weight.shape), weight.device, weight.dtype)
        if (tail is None) != (self.read_tail is None):
            raise ValueError(f"the state has one of conv_tail and read_tail alone: {ANOTHER}")
        if tail is not None:  # that of q, k and v together
            shape = (*tail.shape[:2], tail.shape[2] // 3)
            check_tensor("read_tail", self.read_tail, shape, tail.device)


GATES = {"silu": swiglu, "sigmoid": sigmoid_gate}

register_dataclass(MemoryAndAttentionState)
register_dataclass(MACState)


class Block(nn.Module):
    """Base of the blocks; a block is built from a `TitansConfig`."""

    state_type: type[State]
    num_persistent = 0

    def initial_state(self, like: Tensor) -> State:
        """The state of one row before its first token, the persistent rows read.

        like: gives the type, and the device, of the rows to come.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        lengths: Tensor | None = None,
        fresh: Tensor | None = None,
        trace: bool = False,
    ) -> BlockOutput:
        """x: [B, T, D]; state: where an earlier call stopped (None: a document's start); lengths: [B]
        on the CPU, the real tokens of each row, aligned left (default: all); fresh: [B] on the CPU,
        rows that start a document in spite of the state."""
        begun = begin(x, state, self.state_type, self.initial_state, fresh)
        if state is not None:
            self._check_state(begun)
            begun = self._with_parameters(x, begun)
        return self.mix(x, begun, lengths, trace)

    def _check_state(self, state: Any) -> None:
        """Refuse a state of another number of persistent rows."""
        attention = state if isinstance(state, AttentionState) else getattr(state, "attention", None)
        if attention is None:
            return
        held = 0 if attention.prefix is None else attention.prefix[0].shape[2]
        if held != self.num_persistent:
            raise ValueError(
                f"the state's prefix has {held} rows but the block {self.num_persistent}: {ANOTHER}"
            )

    def _with_parameters(self, x: Tensor, state: Any) -> Any:
        """The state with what it holds of the parameters as they are now, where gradients are wanted.

        Keys of the persistent rows are kept in the state to save their computation; but a state may
        have been detached, and parameters may have changed.
        """
        attention = getattr(state, "attention", None)
        if attention is None or attention.prefix is None or not torch.is_grad_enabled():
            return state
        now = self.initial_state(x).expand(x.shape[0])
        assert isinstance(now, (MemoryAndAttentionState, MACState))
        return replace(state, attention=replace(attention, prefix=now.attention.prefix))

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None, trace: bool) -> BlockOutput:
        """As `forward`, from a state."""
        raise NotImplementedError


class AttentionBlock(Block):
    """`"sliding_attention"` and `"full_attention"`: a Llama layer's attention."""

    state_type: type[State] = AttentionState

    def __init__(self, config: TitansConfig, window: int | None) -> None:
        super().__init__()
        self.attention = Attention(*_attention_sizes(config), window, config.rope_theta)

    def initial_state(self, like: Tensor) -> AttentionState:
        """No keys."""
        return self.attention.initial_state(like)

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None, trace: bool) -> BlockOutput:
        """y = Attn(x)."""
        return BlockOutput(*self.attention(x, state, lengths))


class MemoryBlock(Block):
    """`"lmm"`, and base of the blocks with a memory: y = M(x)."""

    state_type: type[State] = NeuralMemoryState

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        assert config.num_memory_heads  # filled in by the config
        self.memory = NeuralMemory(
            config.hidden_size,
            config.num_memory_heads,
            config.memory_head_dim,
            config.memory_depth,
            config.memory_expansion,
            config.chunk_size,
            conv_kernel=config.conv_kernel,
            momentum=config.memory_momentum,
            decay=config.memory_decay,
            forget=config.memory_forget,
            residual_norm=config.memory_residual_norm,
            unit_scale=config.memory_unit_scale,
            norm_floor=config.memory_norm_floor,
            normalize_values=config.memory_normalize_values,
            max_learning_rate=config.max_memory_learning_rate,
            gate_by_key=config.memory_gate_by_key,
            write_threshold=config.memory_write_threshold,
            initial_alpha=config.initial_alpha,
            initial_eta=config.initial_eta,
            initial_theta=config.initial_theta,
            norm_eps=config.rms_norm_eps,
        )
        self.memory.read_only = config.memory_read_only
        rows = self.num_persistent = config.num_persistent_tokens
        # As large as the normed rows they stand before.
        self.persistent = Weight(rows, config.hidden_size, start=nn.init.normal_) if rows else None

    def initial_state(self, like: Tensor) -> State:
        """The memory after the persistent rows."""
        return self._absorb(self._prefix(like), like)[1]

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None, trace: bool) -> BlockOutput:
        """y = M(x)."""
        return BlockOutput(*self.memory.read_write(x, state, lengths, trace))

    def _prefix(self, like: Tensor) -> Tensor | None:
        """The persistent rows, [1, P, D]."""
        return None if self.persistent is None else self.persistent().to(like.dtype).unsqueeze(0)

    def _absorb(self, rows: Tensor | None, like: Tensor) -> tuple[Tensor | None, NeuralMemoryState]:
        """What an empty memory answers to rows [1, P, D], and its state after them, in a new chunk."""
        state = self.memory.initial_state(1, like.dtype)
        if rows is None:
            return None, state
        output = self.memory.read_write(rows, state)
        return output.y, output.state.close()


class MAG(MemoryBlock):
    """`"mag"`, memory as a gate: y = SWA(x) (x) M(x) (v1 eqs. 26-28)."""

    state_type: type[State] = MemoryAndAttentionState

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.attention = _sliding(config)
        self.attention_norm, self.memory_norm = _norm(config), _norm(config)
        self.gate = GATES[config.gate_act]

    def initial_state(self, like: Tensor) -> State:
        """The memory after the persistent rows, and these in every token's sight."""
        prefix = self._prefix(like)
        return MemoryAndAttentionState(
            self._absorb(prefix, like)[1], self.attention.initial_state(like, prefix)
        )

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None, trace: bool) -> BlockOutput:
        """See the class."""
        seen, attention = self.attention(x, state.attention, lengths)
        out = self.memory.read_write(x, state.memory, lengths, trace)
        with (
            self.memory_norm.unkept(out.y) as gate,
            self.attention_norm.unkept(seen) as seen,
        ):
            y = self.gate(gate, seen)
        state = MemoryAndAttentionState(out.state, attention).known_right()
        return BlockOutput(y, state, out.strength, out.trace)


class MAL(MemoryBlock):
    """`"mal"`, memory as a layer: y = SWA(norm(M(x))) (v1 eqs. 29-31)."""

    state_type: type[State] = MemoryAndAttentionState

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.memory_norm = _norm(config)
        self.attention = _sliding(config)

    def initial_state(self, like: Tensor) -> State:
        """The memory after the persistent rows, and its answers to them in every token's sight."""
        y, memory = self._absorb(self._prefix(like), like)
        prefix = None if y is None else self.memory_norm(y)
        return MemoryAndAttentionState(memory, self.attention.initial_state(like, prefix))

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None, trace: bool) -> BlockOutput:
        """See the class."""
        out = self.memory.read_write(x, state.memory, lengths, trace)
        y, attention = self.attention(self.memory_norm(out.y), state.attention, lengths)
        state = MemoryAndAttentionState(out.state, attention).known_right()
        return BlockOutput(y, state, out.strength, out.trace)


class MAC(MemoryBlock):
    """`"mac"`, memory as context (v1 eqs. 21-25). Segment by segment, with M as the last one left it:

    h = M(x)                    read, nothing written
    y = Attn([P, h, x])         token i sees P, and h_j, x_j of its segment for j <= i
    o = norm(y) (x) M(z)        M absorbs z = norm(x + y), token by token (`mac_residual`; or norm(y))
    """

    state_type: type[State] = MACState

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.attention = SegmentAttention(
            *_attention_sizes(config), config.segment_length, config.rope_theta
        )
        self.attention_norm, self.memory_norm = _norm(config), _norm(config)
        self.residual, self.gate = config.mac_residual, GATES[config.gate_act]

    def initial_state(self, like: Tensor) -> State:
        """The memory after the attention's outputs of the persistent rows over themselves."""
        prefix = self._prefix(like)
        rows = None
        if prefix is not None:
            seen = self.attention.over_prefix(prefix)
            rows = self.attention_norm(prefix + seen if self.residual else seen)
        memory = self._absorb(rows, like)[1]
        tail = memory.conv_tail
        if tail is not None:  # of q alone: zeros, or the persistent rows' last
            tail = tail.chunk(3, -1)[0]
            if prefix is not None:
                with self.memory.queries(prefix) as (_, tail):
                    pass
        return MACState(memory, self.attention.initial_state(like, prefix), memory.weights, tail)

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None, trace: bool) -> BlockOutput:
        """See the class."""
        segment = self.attention.segment
        cuts = Cuts((x.shape[0], x.shape[1]), state.attention.position, segment, lengths)
        # What does not depend on the memory is done for all segments at once.
        outputs: list[BlockOutput] = []
        with self.memory.queries(x, state.read_tail, lengths) as (q, tail):
            rows = (x, q, self.memory.gates_of(x), *self.attention.project(x))
            for pieces in zip(*map(cuts.take, rows), strict=True):
                piece, count = [row for row, _ in pieces], pieces[0][1]
                outputs.append(self._read_segment(piece, state, count, trace))
                state = outputs[-1].state
        whole = join_pieces(outputs, cuts.join)
        return whole._replace(state=replace(whole.state, read_tail=tail).known_right())

    def _check_state(self, state: Any) -> None:
        super()._check_state(state)
        self.attention.check_place(state.attention)  # before the text is cut by it

    def _read_segment(
        self, rows: list[Tensor], state: MACState, lengths: Tensor | None, trace: bool
    ) -> BlockOutput:
        """Tokens of the open segment, no more than it has left; rows: what `mix` made of them."""
        x, q, gate, *seen_by = rows
        h = self.memory.read(q, gate, state.weights)
        seen, attention = self.attention.attend(seen_by, h, state.attention, lengths)
        with ExitStack() as stack:
            y = told = stack.enter_context(self.attention_norm.unkept(seen))
            if self.residual:
                told = stack.enter_context(self.attention_norm.unkept(x + seen))
            out = self.memory.read_write(told, state.memory, lengths, trace)
            y = self.gate(stack.enter_context(self.memory_norm.unkept(out.y)), y)
        # At a segment's end the chunk is closed too, as C divides G: these are M as it stands.
        ended, weights = attention.position == 0, state.weights
        if isinstance(ended, Tensor):
            weights = choose(ended, out.state.weights, weights)
        elif ended:
            weights = out.state.weights
        state = replace(state, memory=out.state, attention=attention, weights=weights)
        return BlockOutput(y, state, out.strength, out.trace)


def _attention_sizes(config: TitansConfig) -> tuple[int, int, int, int]:
    assert config.num_key_value_heads and config.head_dim  # filled in by the config
    return (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )


def _sliding(config: TitansConfig) -> Attention:
    return Attention(*_attention_sizes(config), config.sliding_window, config.rope_theta)


def _norm(config: TitansConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


BLOCKS: dict[str, Callable[[TitansConfig], Block]] = {
    "lmm": MemoryBlock,
    "mac": MAC,
    "mag": MAG,
    "mal": MAL,
    "sliding_attention": lambda config: AttentionBlock(config, config.sliding_window),
    "full_attention": lambda config: AttentionBlock(config, None),
}
