"""Titans as `transformers` models: a Llama decoder whose layers carry a neural memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP

from everlong.layers import Attention, NeuralMemory, RMSNorm
from everlong.models.cache import TitansCache
from everlong.models.configuration_titans import TitansConfig


class MemoryMixer(nn.Module):
    """`"lmm"`: the neural memory alone, y = M(x)."""

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
            residual_norm=config.memory_residual_norm,
            max_learning_rate=config.max_memory_learning_rate,
            initial_alpha=config.initial_alpha,
            initial_eta=config.initial_eta,
            initial_theta=config.initial_theta,
            norm_eps=config.rms_norm_eps,
        )

    def forward(self, x: Tensor, positions: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        """x: [B, T, D]. Returns the same shape, the memory's state and its mean write strength."""
        y, state, strength = self.memory.read_write(x, state)
        return y, state, strength.mean()


class AttentionMixer(nn.Module):
    """`"sliding_attention"` and `"full_attention"`: a Llama layer's attention."""

    def __init__(self, config: TitansConfig, window: int | None) -> None:
        super().__init__()
        assert config.num_key_value_heads and config.head_dim  # filled in by the config
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            window,
            config.rope_theta,
        )

    def forward(self, x: Tensor, positions: Tensor, state: Any) -> tuple[Tensor, Any, None]:
        """x: [B, T, D]. Returns the same shape, the keys and values to go on from, and no writing."""
        return *self.attention(x, positions, state), None


def build_mixer(config: TitansConfig, layer_type: str) -> nn.Module:
    """The token mixer that a name in `layer_types` stands for."""
    if layer_type == "lmm":
        return MemoryMixer(config)
    return AttentionMixer(config, config.sliding_window if layer_type == "sliding_attention" else None)


class TitansLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: TitansConfig, layer_type: str) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = build_mixer(config, layer_type)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: Tensor, positions: Tensor, state: Any = None
    ) -> tuple[Tensor, Any, Tensor | None]:
        """x: [B, T, D]. Returns the same shape, the mixer's new state and mean write strength."""
        mixed, state, written = self.mixer(self.input_norm(x), positions, state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state, written


class TitansPreTrainedModel(PreTrainedModel):
    """Initialisation and the facts that `transformers` asks of a model family."""

    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TitansLayer"]
    _skip_keys_device_placement = "past_key_values"
    _is_stateful = True  # a memory cannot be rolled back: no assisted decoding

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (NeuralMemory, RMSNorm)):
            module.reset_parameters()


@dataclass
class TitansModelOutput(BaseModelOutputWithPast):
    """As the base class; `written` is the mean of `MemoryOutput.strength` over all memories."""

    written: Tensor | None = None


class TitansModel(TitansPreTrainedModel):
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
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> TitansModelOutput:
        """Read tokens; `past_key_values` of one call continues in the next, any number of tokens each.

        Args:
            input_ids: [B, T], or inputs_embeds: [B, T, D].
            attention_mask, position_ids: accepted where they say nothing new (all ones; counting
                on from the cache): padding and packing are refused.
            past_key_values: the states to go on from; changed in place.
            use_cache: keep states for a next call; default the config's.

        Raises ValueError for a cache of another model or batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = TitansCache(self.config.num_hidden_layers)
        elif past_key_values is not None:
            self._check_cache(past_key_values, x.shape[0])
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        _refuse_rows_and_documents(attention_mask, position_ids, positions)
        strengths = []
        for index, layer in enumerate(self.layers):
            cached = None if past_key_values is None else past_key_values.layers[index]
            x, state, written = layer(x, positions, None if cached is None else cached.state)
            if written is not None:
                strengths.append(written)
            if cached is not None:
                cached.state = state
                cached.seen += x.shape[1]
        return TitansModelOutput(
            last_hidden_state=self.norm(x),
            past_key_values=past_key_values,
            written=torch.stack(strengths).mean() if strengths else None,
        )

    def _check_cache(self, cache: Any, batch: int) -> None:
        """Refuse a cache of another kind, model or batch."""
        if not isinstance(cache, TitansCache):
            raise ValueError(
                f"past_key_values must be a TitansCache, got {type(cache).__name__}: pass None for an "
                "empty memory, or the past_key_values that an earlier call of this model returned"
            )
        if len(cache.layers) != len(self.layers):
            raise ValueError(
                f"the cache has {len(cache.layers)} layers but the model {len(self.layers)}: it "
                "belongs to another model"
            )
        if cache.batch_size not in (-1, batch):
            raise ValueError(
                f"the cache was built for batch {cache.batch_size} but the input has batch {batch}: "
                "take rows with cache.batch_select_indices(rows), or pass None for an empty memory"
            )


def _refuse_rows_and_documents(
    attention_mask: Tensor | None, position_ids: Tensor | None, positions: Tensor
) -> None:
    """Pads and packed documents would shift the chunks; refuse them rather than read them wrongly."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask hides tokens, but padding is not supported yet: give rows of one length "
            "(and no mask), or one row at a time"
        )
    if position_ids is not None and not bool((position_ids == positions).all()):
        raise ValueError(
            f"position_ids must count on from {int(positions[0, 0])} in every row: packed documents "
            "and restarts are not supported yet"
        )


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head: trains, saves, loads and generates as Llama does."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """`generate` carries the memory in our cache, unless the user brings one or wants none."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not hold a "
                "memory: leave it out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = TitansCache(self.config.num_hidden_layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `TitansModel.forward`, with logits and, where `labels` [B, T] are given, the loss.

        In training, `memory_write_cost` of the configuration adds its price to the loss.
        Labels are token ids, -100 where nothing is asked; they are shifted here. logits_to_keep: how
        many last positions get logits (0: all), or their indices.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.vocab_size, **kwargs)
            if self.training and self.config.memory_write_cost and outputs.written is not None:
                # Over accumulated batches the price is shared as the loss itself is.
                items = kwargs.get("num_items_in_batch")
                share = 1.0 if items is None else (labels[:, 1:] != -100).sum() / items
                loss = loss + self.config.memory_write_cost * outputs.written * share
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
