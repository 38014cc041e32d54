"""RMT: a causal language model of `transformers` that reads in segments and hands itself a memory.

Bulatov, Kuratov, Burtsev: Recurrent Memory Transformer (arXiv 2207.06881), the decoder's form.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass
from transformers import AutoModel, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from everlong.layers import AttentionState, Weight
from everlong.models.configuration_rmt import INSTEAD, KINDS, RMTConfig
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
from everlong.ops.documents import Cuts
from everlong.ops.state import (
    ANOTHER,
    PerRow,
    State,
    agreed,
    check_kind,
    check_position,
    check_same_place,
    check_tensor,
    check_tuple,
    per_row,
)


@dataclass(frozen=True)
class RMTState(State):
    """Keys and values of the open segment, and its memory.

    layers: for each layer of the model inside, keys of the memory and of the open segment's tokens
    behind it; position: how many these are, 0 before a segment's first token. memory: [B, m, D].
    """

    layers: tuple[AttentionState, ...]
    memory: Tensor

    def check_fields(self) -> None:
        """Raise ValueError where the fields do not fit each other."""
        check_tuple("layers", self.layers)
        for layer in self.layers:
            check_kind("layers", layer, AttentionState)
            layer.check()
            layer.check_slots(layer.position)
        check_same_place(*(layer.place for layer in self.layers))
        device = self.layers[0].keys.device
        check_tensor("memory", self.memory, (self.batch_size, None, None), device)

    @property
    def place(self) -> PerRow:
        """Rows of the open segment so far, its memory's too."""
        return self.layers[0].place


register_dataclass(RMTState)


class Segment(GradientCheckpointingLayer):
    """One pass of the model inside over rows behind those that its keys stand for.

    A module of its own, without parameters: where gradients are computed again, it is for a segment at
    a time.
    """

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        layers: tuple[AttentionState, ...],
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[AttentionState, ...]]:
        """x: [B, T, D], T >= 1; lengths: [B] on the CPU, the real rows of each (None: all). Returns
        the last hidden states [B, T, D] and the layers with T more keys."""
        return _run(base, x, layers, lengths)


def _run(
    base: nn.Module, x: Tensor, layers: tuple[AttentionState, ...], lengths: Tensor | None
) -> tuple[Tensor, tuple[AttentionState, ...]]:
    past, slots = layers[0].position, layers[0].keys.shape[2]
    positions = torch.as_tensor(past, device="cpu").view(-1, 1) + torch.arange(x.shape[1], device="cpu")
    if lengths is not None:  # pads stay within a table of positions
        last = past + lengths - 1
        positions = torch.minimum(positions, last.clamp(min=0)[:, None])
    mask = None
    if isinstance(past, torch.Tensor):
        mask = torch.arange(slots + x.shape[1], device="cpu") >= slots - past[:, None]
        mask = mask.to(x.device, torch.long)
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        if slots:
            cache.update(layer.keys.to(x.dtype), layer.values.to(x.dtype), index)
    out = base(
        inputs_embeds=x,
        attention_mask=mask,
        position_ids=positions.to(x.device).expand(len(x), -1),
        past_key_values=cache,
        use_cache=True,
    )
    after = agreed(past + (x.shape[1] if lengths is None else lengths))
    kept = tuple(
        layer.keep(new.keys, new.values, after, lengths)
        for layer, new in zip(layers, cache.layers, strict=True)
    )
    return out.last_hidden_state, kept


class RMTPreTrainedModel(StatefulPreTrained, PreTrainedModel):
    """Initialisation and the facts that `transformers` asks of a model family."""

    config_class = RMTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the model inside."""
        return self.base_model.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Other embeddings for the model inside."""
        self.base_model.base.set_input_embeddings(value)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Weight):
            module.reset_parameters()

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for name, module in self.named_modules():
            # Checkpoints inside the checkpoint would drop the keys that a segment hands on.
            if ".base." in f".{name}." and hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


class RMTModel(StatefulDecoder, RMTPreTrainedModel):
    """The decoder without a head; `base` is the model inside."""

    num_states = 1

    def __init__(self, config: RMTConfig) -> None:
        super().__init__(config)
        self.base = AutoModel.from_config(config.base)
        start = partial(nn.init.normal_, std=getattr(config.base, "initializer_range", 0.02))
        self.memory = Weight(config.num_memory_tokens, config.hidden_size, start=start)
        self.segment = Segment()
        self.norm = nn.Identity()  # the model inside has its own
        self._no_split_modules = list(self.base._no_split_modules or [])
        self.post_init()

    @property
    def embed_tokens(self) -> nn.Module:  # type: ignore[override]
        """The embeddings of the model inside."""
        return self.get_input_embeddings()

    def initial_state(self, like: Tensor) -> RMTState:
        """The state of one row before its first token."""
        heads, size = self.config.key_shape
        none = like.new_zeros(1, heads, 0, size)
        layer = AttentionState(none, none, 0, None)
        memory = self.memory().to(like.device, like.dtype).unsqueeze(0)
        return RMTState((layer,) * self.config.num_hidden_layers, memory)

    def through_layers(
        self,
        x: Tensor,
        states: Sequence[Any],
        lengths: Tensor | None,
        fresh: Tensor | None,
        trace: bool,
        *more: Any,
    ) -> list[BlockOutput]:
        """As in `StatefulDecoder`: all layers are one."""
        state = begin(x, states[0], RMTState, self.initial_state, fresh)
        if states[0] is not None:
            self._check_state(x, state)
        if not x.shape[1]:
            return [BlockOutput(x, state)]
        # What is open: tokens behind the memory that the keys begin with.
        memory = self.config.num_memory_tokens
        seen = state.layers[0].position
        position = (seen - memory).clamp(min=0) if isinstance(seen, Tensor) else max(seen - memory, 0)
        outputs: list[BlockOutput] = []
        cuts = Cuts((x.shape[0], x.shape[1]), position, self.config.segment_length, lengths)
        for piece, count in cuts.take(x):
            if count is None and not isinstance(state.layers[0].position, Tensor):
                outputs.append(self._read_together(piece, state))
            else:
                outputs.append(self._read_rows(piece, state, count))
            state = outputs[-1].state
        return [join_pieces(outputs, cuts.join)]

    def _check_state(self, x: Tensor, state: RMTState) -> None:
        """Refuse a state that is not this model's."""
        state.check_like(self.initial_state(x))
        m, batch = self.config.num_memory_tokens, state.batch_size
        position = state.layers[0].position
        check_position(position, batch, m + self.config.segment_length)
        # Open segments have read their memory and a token at least.
        if not bool(((per_row(position, batch) == 0) | (per_row(position, batch) > m)).all()):
            raise ValueError(
                f"the state's position {position} lies in its {m} rows of memory: {ANOTHER}"
            )

    def _closed(self, memory: Tensor) -> RMTState:
        """Before the first token of a segment with this memory [B, m, D]."""
        state = self.initial_state(memory).expand(len(memory))
        return replace(state, memory=memory)

    def _read_together(self, x: Tensor, state: RMTState) -> BlockOutput:
        """Tokens of the open segment where all rows stand at one place: a single pass."""
        seen = state.layers[0].position
        memory, tokens = state.memory.to(x.dtype), x.shape[1]
        m = memory.shape[1]
        rows = [x] if seen else [memory, x]
        ends = max(seen, m) + tokens == m + self.config.segment_length
        y, layers = self.segment(
            self.base, torch.cat([*rows, memory] if ends else rows, 1), state.layers
        )
        start = 0 if seen else m
        after = self._closed(y[:, -m:]) if ends else RMTState(layers, state.memory)
        return BlockOutput(y[:, start : start + tokens], after)

    def _read_rows(self, x: Tensor, state: RMTState, lengths: Tensor | None) -> BlockOutput:
        """The same where rows stand at places of their own: a pass over the memory of those that
        begin a segment, one over the tokens, one over the memory of those that end it."""
        batch, m = x.shape[0], self.config.num_memory_tokens
        count = per_row(x.shape[1] if lengths is None else lengths, batch)
        begins = (per_row(state.layers[0].position, batch) == 0) & (count > 0)
        if bool(begins.any()):
            part = state.select(begins.nonzero().squeeze(1))
            part = self._closed(part.memory.to(x.dtype))
            _, layers = self.segment(self.base, part.memory, part.layers)
            state = _put(state, begins, replace(part, layers=layers))
        y, layers = self.segment(self.base, x, state.layers, lengths)
        state = replace(state, layers=layers)
        ends = per_row(layers[0].position, batch) == m + self.config.segment_length
        if bool(ends.any()):
            part = state.select(ends.nonzero().squeeze(1))
            written, _ = self.segment(self.base, part.memory.to(x.dtype), part.layers)
            state = _put(state, ends, self._closed(written))
        return BlockOutput(y, state)


def _put(state: RMTState, rows: Tensor, part: RMTState) -> RMTState:
    """The state with those of `part` in the rows where `rows` [B] holds, in their order."""
    behind = torch.arange(len(rows), device="cpu").where(~rows, len(rows) - 1 + rows.cumsum(0))
    return RMTState.join([state, part]).select(behind)


class RMTForCausalLM(StatefulCausalLM, RMTPreTrainedModel, GenerationMixin):
    """The decoder with the head of the model inside."""

    def __init__(self, config: RMTConfig) -> None:
        super().__init__(config)
        self.model = RMTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        table = self.model.get_input_embeddings().weight
        name = next(name for name, value in self.named_parameters() if value is table)
        self._tied_weights_keys = {"lm_head.weight": name}
        self.post_init()

    @classmethod
    def from_causal_lm(
        cls, causal_lm: str | PathLike[str] | PreTrainedModel, **options: Any
    ) -> "RMTForCausalLM":
        """A pretrained causal language model (a folder, a hub id or the model) with a fresh memory.

        options: fields of `RMTConfig`; and, as of `from_pretrained`, how the model is loaded
        (gguf_file, dtype, revision, ...) and where the new one goes (device_map, ...). Raises
        ValueError for a model that cannot be wrapped.
        """
        inner, fields, placing = load_pretrained(causal_lm, options, KINDS, f": {INSTEAD}")
        config = RMTConfig(base_config=copy.deepcopy(inner.config), **fields)
        head = _head_of(inner)
        model = cast_parameters(cls(config), inner.dtype)
        model.model.base.load_state_dict(inner.base_model.state_dict())
        model.lm_head.load_state_dict({"weight": head.weight})
        model.tie_weights()
        return place(model, inner, placing)


@torch.no_grad()
def _head_of(inner: PreTrainedModel) -> nn.Linear:
    """The matrix that makes its logits; raises ValueError where it takes more than that."""
    ids = torch.arange(min(8, inner.get_input_embeddings().num_embeddings), device=inner.device)[None]
    head, training = inner.get_output_embeddings(), inner.training
    plain = inner.eval()(ids).logits
    hidden = inner.base_model(ids).last_hidden_state
    inner.train(training)
    linear = isinstance(head, nn.Linear) and torch.allclose(hidden @ head.weight.T, plain)
    if not linear or head.bias is not None:
        raise ValueError(
            f"a {type(inner).__name__} ({inner.config.name_or_path}) gets its logits by more than a "
            "product with one matrix, which is all that RMT's head does"
        )
    return head
