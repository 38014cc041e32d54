"""LM2 as a `transformers` model: a Llama whose chosen layers read and write a bank of slots."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from everlong.layers import AttentionState, Gate, PositionBank, ReleasedBank, SlotBank, Weight
from everlong.layers.attention import join_keys
from everlong.layers.memory_bank import BankWrite, PositionState
from everlong.models.configuration_lm2 import LM2Config
from everlong.models.pretrained import load_pretrained, place
from everlong.models.stateful import (
    BlockOutput,
    StatefulCausalLM,
    StatefulDecoder,
    StatefulPreTrained,
    begin,
    cast_parameters,
    join_pieces,
)
from everlong.ops.attention import causal_mask
from everlong.ops.documents import Cuts
from everlong.ops.state import (
    PerRow,
    State,
    agreed,
    check_position,
    check_same_place,
    check_tensor,
    choose,
    per_row,
)

NOT_INHERITED = {"architectures", "transformers_version"}


@dataclass(frozen=True)
class LM2State(State):
    """A layer's open segment and bank.

    attention: keys and values of the open segment's tokens. offered: what these offer to the slots
    (`"slots"`). rows: their rows of the bank (`"positions"`, `"released"`). bank: [B, R, D]; in
    `"slots"` as the segments before left it; else the one bank of all layers, in the first layer's
    state, where the open segment's rows are new already. None where a layer has none.
    """

    attention: AttentionState
    offered: AttentionState | None
    rows: PositionState | None
    bank: Tensor | None

    def check_fields(self) -> None:
        """Raise ValueError where the fields do not fit each other."""
        self.check_part("attention", AttentionState)
        self.attention.check_slots(self.attention.position)
        places = [self.place]
        if self.offered is not None:
            self.check_part("offered", AttentionState)
            self.offered.check_slots(self.offered.position)
            places.append(self.offered.place)
        if self.rows is not None:
            self.check_part("rows", PositionState)
            places.append(self.rows.seen.place)
        if self.bank is not None:
            bank = (self.batch_size, None, None)
            check_tensor("bank", self.bank, bank, self.attention.keys.device)
        check_same_place(*places)

    @property
    def place(self) -> PerRow:
        """Tokens of the open segment so far."""
        return self.attention.place


register_dataclass(LM2State)


class LM2Attention(LlamaAttention):
    """Llama's attention inside a segment, from a state."""

    def initial_state(self, like: Tensor) -> AttentionState:
        """No keys."""
        none = like.new_zeros(1, self.config.num_key_value_heads, 0, self.head_dim)
        return AttentionState(none, none, 0, None)

    def attend(
        self, x: Tensor, state: AttentionState, rotary: nn.Module, lengths: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        """x: [B, T, D], in each row no more tokens than its open segment has left. rotary: Llama's,
        cos and sin of positions. Returns E [B, T, D] and the state, a new segment's where one is full.
        """
        q, k, v = (
            each(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        start = torch.as_tensor(state.position, device="cpu").to(x.device).view(-1, 1)
        cos, sin = rotary(x, start + torch.arange(x.shape[1], device=x.device))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = join_keys(state.keys, k), join_keys(state.values, v)
        mask = causal_mask(q, k.shape[2], state.position, None)
        if mask is not None and mask.dim() == 2:
            mask = mask[None, None]
        dropout = self.attention_dropout if self.training else 0.0
        y, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            self, q, k, v, mask, dropout=dropout, scaling=self.scaling
        )
        position = _behind(state.position, x, lengths, self.config.segment_length)
        return self.o_proj(y.flatten(2)), state.keep(k, v, position, lengths)


class LM2Layer(LlamaDecoderLayer):
    """Llama's layer over a segment: x + E + what the bank gives, then x + MLP(norm(x))."""

    def __init__(self, config: LM2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert isinstance(config.memory_layers, list) and config.num_memory_slots
        self.config = config
        self.self_attn = LM2Attention(config, layer_idx)
        self.memory: Any = None
        if layer_idx in config.memory_layers:
            shared: Any = {"top_k": config.memory_top_k, "initial_scale": config.initial_memory_scale}
            if config.memory_addressing == "slots":
                self.memory = SlotBank(
                    config.hidden_size,
                    config.num_memory_slots,
                    config.num_memory_heads,
                    initial_forget=config.initial_memory_forget,
                    identity=config.identity_slots,
                    **shared,
                )
            else:
                kind = PositionBank if config.memory_addressing == "positions" else ReleasedBank
                self.memory = kind(
                    config.hidden_size, config.num_memory_slots, config.num_memory_heads, **shared
                )
        self.holds_bank = layer_idx == min(config.memory_layers, default=-1)

    def initial_state(self, like: Tensor) -> LM2State:
        """The state of one row before its first token."""
        attention = self.self_attn.initial_state(like)
        if self.memory is None:
            return LM2State(attention, None, None, None)
        if self.config.memory_addressing == "slots":
            none = like.new_zeros(1, self.memory.num_heads, 0, like.shape[-1] // self.memory.num_heads)
            offered = AttentionState(none, none, 0, None)
            return LM2State(attention, offered, None, self.memory.initial(like))
        bank = None
        if self.holds_bank:  # as the paper starts it: slot r is row r of the identity
            slots, width = self.memory.num_slots, self.config.hidden_size
            dtype = torch.promote_types(like.dtype, torch.float32)
            bank = torch.eye(slots, width, dtype=dtype, device=like.device).unsqueeze(0)
        return LM2State(attention, None, self.memory.initial_state(like), bank)

    def begin(self, x: Tensor, state: Any, fresh: Tensor | None) -> LM2State:
        """The state to go on from; refuses another model's."""
        begun = begin(x, state, LM2State, self.initial_state, fresh)
        if state is not None:
            check_position(begun.attention.position, begun.batch_size, self.config.segment_length)
            begun.check_like(self.initial_state(x))
        return begun

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class SlotLayer(LM2Layer):
    """With a bank of its own, which any number of tokens reads (`"slots"`), or none."""

    def forward(
        self,
        x: Tensor,
        state: Any,
        rotary: nn.Module,
        lengths: Tensor | None = None,
        fresh: Tensor | None = None,
        trace: bool = False,
    ) -> BlockOutput:
        """x: [B, T, D]; the rest as a block of Titans."""
        state = self.begin(x, state, fresh)
        shape, segment = (x.shape[0], x.shape[1]), self.config.segment_length
        cuts = Cuts(shape, state.attention.position, segment, lengths)
        outputs: list[BlockOutput] = []
        for piece, count in cuts.take(x):
            outputs.append(self._read_segment(piece, state, rotary, count, trace))
            state = outputs[-1].state
        output = join_pieces(outputs, cuts.join)
        return output._replace(y=self._mlp(output.y))

    def _read_segment(
        self, x: Tensor, state: LM2State, rotary: nn.Module, lengths: Tensor | None, trace: bool
    ) -> BlockOutput:
        """Tokens of the open segment, no more than it has left: x + E + what the bank gives."""
        e, attention = self.self_attn.attend(self.input_layernorm(x), state.attention, rotary, lengths)
        if self.memory is None:
            return BlockOutput(x + e, LM2State(attention, None, None, None))
        assert state.bank is not None and state.offered is not None
        got, found = self.memory.read(e, state.bank, trace)
        k, v = self.memory.keys_and_values(e)
        k, v = join_keys(state.offered.keys, k), join_keys(state.offered.values, v)
        offered = state.offered.keep(k, v, attention.position, lengths)
        bank, writes = self._written(state, k, v, lengths, x.shape[1], trace)
        found = None if found is None else found._replace(writes=writes)
        return BlockOutput(x + (e + got), LM2State(attention, offered, None, bank), None, found)

    def _written(
        self,
        state: LM2State,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        tokens: int,
        trace: bool,
    ) -> tuple[Tensor, tuple[BankWrite, ...]]:
        """The bank behind the tokens, written in the rows whose segment ends with them, and how."""
        bank, position, segment = state.bank, state.attention.position, self.config.segment_length
        assert bank is not None
        if lengths is None and not isinstance(position, Tensor):  # all rows end together, or none
            if position + tokens != segment:
                return bank, ()
            new, *gates = self.memory.write(bank, k, v)
            return new, (
                BankWrite(torch.arange(len(k), device="cpu"), bank, new, *gates),
            ) if trace else ()
        count = per_row(tokens if lengths is None else lengths, len(k))
        before = per_row(position, len(k))
        ended = before + count == segment
        if not bool(ended.any()):
            return bank, ()
        column, past = torch.arange(k.shape[2], device="cpu"), k.shape[2] - tokens
        real = (column >= past - before[:, None]) & (column < past + count[:, None])
        mask = (real | ~ended[:, None]).to(k.device)[:, None, None]
        new, *gates = self.memory.write(bank, k, v, mask)
        rows = ended.nonzero().squeeze(1)
        picked = [x[rows.to(x.device)] for x in (bank, new, *gates)] if trace else []
        writes = (BankWrite(rows, *picked),) if trace else ()
        return (new if bool(ended.all()) else choose(ended, new, bank)), writes


class PositionLayer(LM2Layer):
    """With the bank that flows from layer to layer (`"positions"`, `"released"`), or past it."""

    def forward(
        self,
        x: Tensor,
        rows: Tensor,
        state: LM2State,
        rotary: nn.Module,
        lengths: Tensor | None = None,
        trace: bool = False,
    ) -> tuple[BlockOutput, Tensor]:
        """x: [B, T, D], in each row no more tokens than its open segment has left; rows: the bank's
        rows at their places, [B, T, D]. Returns also the rows for the next layer."""
        e, attention = self.self_attn.attend(self.input_layernorm(x), state.attention, rotary, lengths)
        if self.memory is None:
            return BlockOutput(self._mlp(x + e), replace(state, attention=attention)), rows
        assert state.rows is not None
        got = self.memory(e, rows, state.rows, lengths, trace)
        after = replace(state, attention=attention, rows=got.state)
        return BlockOutput(self._mlp(x + (e + got.out)), after, None, got.trace), got.rows


def _behind(position: PerRow, x: Tensor, lengths: Tensor | None, segment: int) -> PerRow:
    """The position behind the tokens of x; 0 where a segment is full."""
    return agreed((position + (x.shape[1] if lengths is None else lengths)) % segment)


class LM2PreTrainedModel(StatefulPreTrained, LlamaPreTrainedModel):
    """Initialisation and the facts that `transformers` asks of a model family."""

    config_class = LM2Config
    _no_split_modules: list[str] = []  # a model's own layers are of one class, see LM2Model
    _supports_flash_attn = _supports_flex_attn = False
    _can_record_outputs: dict[str, Any] = {}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gate):
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, Weight):
            module.reset_parameters()


class LM2Model(StatefulDecoder, LM2PreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: LM2Config) -> None:
        # Not LlamaModel's own, which would build its layers first.
        LlamaPreTrainedModel.__init__(self, config)
        kind = SlotLayer if config.memory_addressing == "slots" else PositionLayer
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(kind(config, index) for index in range(config.num_hidden_layers))
        # Of what is named here all has to be there: sharding looks for it.
        self._no_split_modules = [kind.__name__]
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def through_layers(
        self,
        x: Tensor,
        states: Sequence[Any],
        lengths: Tensor | None,
        fresh: Tensor | None,
        trace: bool,
    ) -> list[BlockOutput]:
        """As in `StatefulDecoder`."""
        layers: list[Any] = list(self.layers)
        if not x.shape[1]:  # Llama's attention wants tokens
            pairs = zip(layers, states, strict=True)
            return [BlockOutput(x, layer.begin(x, state, fresh)) for layer, state in pairs]
        if self.config.memory_addressing == "slots":
            return super().through_layers(x, states, lengths, fresh, trace, self.rotary_emb)
        states = [layer.begin(x, s, fresh) for layer, s in zip(layers, states, strict=True)]
        segment, shape = self.config.segment_length, (x.shape[0], x.shape[1])
        cuts = Cuts(shape, states[0].attention.position, segment, lengths)
        outputs: list[list[BlockOutput]] = []
        for piece, count in cuts.take(x):
            outputs.append(self._through_segment(piece, states, count, trace))
            states = [out.state for out in outputs[-1]]
        return [join_pieces(list(parts), cuts.join) for parts in zip(*outputs, strict=True)]

    def _through_segment(
        self, x: Tensor, states: Sequence[LM2State], lengths: Tensor | None, trace: bool
    ) -> list[BlockOutput]:
        """Tokens of the open segment through all layers, and the bank with them."""
        holder = min(self.config.memory_layers, default=None)
        position = states[0].attention.position
        rows, places = x.new_zeros(x.shape), None
        if holder is not None:
            bank = states[holder].bank
            places = _places(position, x, lengths)
            rows = bank.gather(1, places.clamp(max=bank.shape[1] - 1))
        outputs = []
        for layer, state in zip(self.layers, states, strict=True):
            output, rows = layer(x, rows, state, self.rotary_emb, lengths=lengths, trace=trace)
            outputs.append(output)
            x = output.y
        if holder is not None and places is not None:
            state = outputs[holder].state
            bank = _put_rows(state.bank, rows, places)
            outputs[holder] = outputs[holder]._replace(state=replace(state, bank=bank))
        return outputs


def _places(position: PerRow, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Which slot belongs to each token, [B, T, D]; beyond the bank at pads."""
    steps = torch.arange(x.shape[1], device="cpu")
    place = torch.as_tensor(position, device="cpu").view(-1, 1) + steps
    if lengths is not None:
        place = place.where(steps < lengths[:, None], 1 << 40)
    return place.to(x.device)[..., None].expand(x.shape)


def _put_rows(bank: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """The bank with new rows at their places; those beyond it are dropped."""
    spare = places.clamp(max=bank.shape[1])
    return torch.cat([bank, bank[:, :1]], 1).scatter(1, spare, rows.to(bank.dtype))[:, :-1]


class LM2ForCausalLM(StatefulCausalLM, LM2PreTrainedModel, LlamaForCausalLM):
    """The decoder with a language-model head: trains, saves, loads and generates as Llama does."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LM2Config) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LM2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_llama(
        cls, llama: str | PathLike[str] | LlamaForCausalLM, **options: Any
    ) -> "LM2ForCausalLM":
        """A pretrained Llama (a folder, a hub id or the model) with banks that start closed: on one
        segment its logits are the Llama's. options: fields of `LM2Config`, such as memory_layers and
        num_memory_slots; segment_length defaults to the Llama's longest text. And, as of
        `from_pretrained`, how the Llama is loaded (gguf_file, dtype, revision, ...) and where the new
        model goes (device_map, ...).

        Raises ValueError for a model that is no Llama.
        """
        instead = ", not a llama: RMTForCausalLM.from_causal_lm gives memory to models of other kinds"
        source, fields, placing = load_pretrained(llama, options, ["llama"], instead)
        own = {each.name for each in dataclasses.fields(LM2Config)} - NOT_INHERITED
        inherited = {name: value for name, value in source.config.to_dict().items() if name in own}
        defaults = {
            "segment_length": source.config.max_position_embeddings,
            "initial_memory_scale": 0.0,
        }
        model = cls(LM2Config(**(inherited | defaults | fields)))
        cast_parameters(model, source.dtype)
        missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
        assert not unexpected and all(".memory." in key for key in missing)
        return place(model, source, placing)
