"""Gated DeltaNet: the linear layers of Qwen3-Next alone, as one of the models to compare with.

The layers are those of `transformers`; here are a configuration that has no others, and a cache that
counts tokens without an attention layer to count them.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationConfig, Qwen3NextConfig, Qwen3NextForCausalLM

from everlong.models.configuration import checked


@checked
class GatedDeltaNetConfig(Qwen3NextConfig):
    """Qwen3-Next with linear layers and plain MLPs alone; its fields, of which these decide sizes.

    Args:
        linear_num_key_heads, linear_num_value_heads: heads of the memory; default num_attention_heads.
        linear_key_head_dim, linear_value_head_dim: their sizes; default hidden_size over the heads.
    """

    model_type = "gated_deltanet"

    num_experts: int = 0
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        heads = self.linear_num_key_heads = self.linear_num_key_heads or self.num_attention_heads
        self.linear_num_value_heads = self.linear_num_value_heads or heads
        self.linear_key_head_dim = self.linear_key_head_dim or self.hidden_size // heads
        self.linear_value_head_dim = (
            self.linear_value_head_dim or self.hidden_size // self.linear_num_value_heads
        )
        self.layer_types = ["linear_attention"] * self.num_hidden_layers
        self.mlp_only_layers = list(range(self.num_hidden_layers))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Sizes that must fit each other."""
        super().validate_architecture()
        if self.num_experts:
            raise ValueError(f"gated_deltanet has plain MLPs: num_experts is 0, got {self.num_experts}")


class LinearCache(DynamicCache):
    """States of linear layers, and how many tokens they have read."""

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config=config)
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over past and new tokens."""
        return self.seen + query_length, 0


class GatedDeltaNetForCausalLM(Qwen3NextForCausalLM):
    """Qwen3-Next's causal language model with such a cache."""

    config_class = GatedDeltaNetConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `transformers`."""
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = LinearCache(self.config)
        out = super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=past_key_values is not None,
            **kwargs,
        )
        if past_key_values is not None:
            given = input_ids if inputs_embeds is None else inputs_embeds
            assert given is not None
            past_key_values.seen += given.shape[1]
        return out

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = LinearCache(self.config)
