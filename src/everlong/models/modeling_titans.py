"""Titans as `transformers` models: a Llama decoder whose layers carry a neural memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP

from everlong.layers import Gate, RMSNorm, Weight
from everlong.models.cache import MemoryCache
from everlong.models.card import write_card
from everlong.models.configuration_titans import TitansConfig
from everlong.models.stateful import BlockOutput, StatefulDecoder, StatefulGeneration
from everlong.models.titans_blocks import BLOCKS
from everlong.ops import MemoryTrace

FAINT = 1e-3  # of the full strength of writing: below it the price of `memory_write_cost` fades


class TitansLayer(GradientCheckpointingLayer):
    """x + block(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: TitansConfig, layer_type: str) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = BLOCKS[layer_type](config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        lengths: Tensor | None = None,
        fresh: Tensor | None = None,
        trace: bool = False,
    ) -> BlockOutput:
        """x: [B, T, D]. As the block, whose output it gives with its own y."""
        output = self.mixer(self.input_norm(x), state, lengths, fresh, trace)
        x = x + output.y
        return output._replace(y=x + self.mlp(self.mlp_norm(x)))


class TitansPreTrainedModel(PreTrainedModel):
    """Initialisation and the facts that `transformers` asks of a model family."""

    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TitansLayer"]
    # Of a call: what counts tokens stays on the CPU, wherever a layer is.
    _skip_keys_device_placement = ["past_key_values", "lengths", "fresh"]
    _is_stateful = True  # a memory cannot be rolled back: no assisted decoding

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in `transformers`, and a model card (README.md) where there is none."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_card(save_directory, self.config, self.num_parameters())

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        function = kwargs.get("gradient_checkpointing_func")
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True cannot checkpoint a layer that hands out its memory: leave it out, "
                "or say use_reentrant=False"
            )
        super()._set_gradient_checkpointing(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, Gate):
                module.reset_bias()
            elif module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (Weight, RMSNorm)):
            module.reset_parameters()


@dataclass
class TitansModelOutput(BaseModelOutputWithPast):
    """As the base class, and what the memories did.

    written: [B, T], how strongly each token was written: the mean over all memories of
    log(1 + s / 0.001), s = `MemoryOutput.strength`, 0 at pads; None without a memory.
    memory: with output_memory=True, for each layer a `MemoryTrace`, [B, T, ...] each, or None where
    it has no memory.
    """

    written: Tensor | None = None
    memory: tuple[MemoryTrace | None, ...] | None = None


@dataclass
class TitansCausalLMOutput(CausalLMOutputWithPast):
    """As the base class, with `memory` as in `TitansModelOutput`."""

    memory: tuple[MemoryTrace | None, ...] | None = None


class TitansModel(StatefulDecoder, TitansPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(TitansLayer(config, kind) for kind in config.layer_types or [])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_memory: bool = False,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> TitansModelOutput:
        """Read tokens; `past_key_values` of one call continues in the next, any number of tokens each.

        Args:
            input_ids: [B, T], or inputs_embeds: [B, T, D].
            attention_mask: [B, T], or [B, past + T] with the past's columns first; 0 at pads, on
                either side. Pads are not read: a row is read as it would be alone.
            position_ids: [B, T]; a 0 at a real token starts a document, whose memory is empty and
                whose attention sees nothing before it. Positions themselves are counted here.
            past_key_values: the states to go on from; changed in place.
            use_cache: keep states for a next call; default the config's.
            output_memory: also return what each memory did, token by token (slow).
            output_hidden_states: also return what enters the first layer and what leaves each, the
                last one's normed.

        Raises ValueError for a cache of another model or batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        outputs, cache = self.read(
            x, attention_mask, position_ids, past_key_values, use_cache, output_memory
        )
        y = outputs[-1].y
        written = [_price(out.strength).to(y.device) for out in outputs if out.strength is not None]
        last = self.norm(y)
        hidden = (x, *(out.y for out in outputs[:-1]), last)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return TitansModelOutput(
            last_hidden_state=last,
            past_key_values=cache,
            hidden_states=hidden if output_hidden_states else None,
            written=torch.stack(written).mean(0) if written else None,
            memory=tuple(out.trace for out in outputs) if output_memory else None,
        )


def _price(strength: Tensor) -> Tensor:
    """[B, T] of [B, T, H, L]: each e-fold of a strength above `FAINT` costs the same.

    A price that is linear fades together with the strength, long before a text of a hundred thousand
    tokens is faint enough; and it is dearest where writing is wanted.
    """
    return torch.log1p(strength / FAINT).mean((-1, -2))


class TitansForCausalLM(TitansPreTrainedModel, StatefulGeneration, GenerationMixin):
    """The decoder with a language-model head: trains, saves, loads and generates as Llama does."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_memory: bool = False,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> TitansCausalLMOutput:
        """As `TitansModel.forward`, with logits and, where `labels` [B, T] are given, the loss.

        In training, `memory_write_cost` of the configuration adds its price to the loss.
        Labels are token ids, -100 where nothing is asked; they are shifted here. logits_to_keep: how
        many last positions get logits (0: all), or their indices.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_memory,
            output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.vocab_size, **kwargs)
            if self.training and self.config.memory_write_cost and outputs.written is not None:
                real = torch.ones_like(labels) if attention_mask is None else attention_mask
                # Over accumulated batches the price is shared as the loss itself is.
                items = kwargs.get("num_items_in_batch")
                share = 1.0 if items is None else (labels[:, 1:] != -100).sum() / items
                price = (
                    self.config.memory_write_cost
                    * outputs.written.sum()
                    / real[:, -labels.shape[1] :].sum()
                )
                loss = loss + price * share
        return TitansCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            memory=outputs.memory,
        )
