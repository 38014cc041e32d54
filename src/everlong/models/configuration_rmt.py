"""Configuration of RMT: a causal language model of `transformers` that reads in segments."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

INSTEAD = (
    "RMT wraps a causal language model whose layers all keep keys and values, such as llama or gpt2"
)


@strict
class RMTConfig(PreTrainedConfig):
    """A recurrent memory Transformer (arXiv 2207.06881) around a causal language model.

    Text goes by in segments. The model reads [memory, segment, memory]: what it makes of the second
    memory is the memory of the next segment.

    Args:
        base_config: the configuration of the model inside, or its fields with `model_type`.
        num_memory_tokens: m, rows of the memory. segment_length: tokens of a segment.
        backprop_segments: gradients are cut at every so many segments, and at the start of a call that
            goes on from a cache; None: never.
    """

    model_type = "rmt"
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}

    base_config: dict | PreTrainedConfig | None = None
    num_memory_tokens: int = 16
    segment_length: int = 512
    backprop_segments: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Fields that every model has are the inner one's.
        inner = {
            name: kwargs.pop(name)
            for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
            if name in kwargs
        }
        base: Any = {"model_type": "llama"} if self.base_config is None else self.base_config
        if isinstance(base, dict):
            kind = base.get("model_type")
            if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                raise ValueError(f"unknown model_type {kind!r} in base_config: {INSTEAD}")
            base = CONFIG_MAPPING[kind](**inner | {k: v for k, v in base.items() if k != "model_type"})
        self.base_config = base
        self.tie_word_embeddings = bool(base.tie_word_embeddings)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs[name] = getattr(base, name, None)
        super().__post_init__(**kwargs)

    @property
    def base(self) -> Any:
        """The configuration of the model inside."""
        return self.base_config

    @property
    def hidden_size(self) -> int:
        """Width of the model inside."""
        return self.base.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model inside."""
        return self.base.num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Tokens of the model inside."""
        return self.base.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.base.vocab_size = value

    @property
    def key_shape(self) -> tuple[int, int]:
        """Heads and size of the keys in the model inside."""
        heads = self.base.num_attention_heads
        size = getattr(self.base, "head_dim", None) or self.base.hidden_size // heads
        return getattr(self.base, "num_key_value_heads", None) or heads, size

    def state_fields(self) -> dict[str, Any]:
        """What decides whether a cache of one model fits another."""
        return {
            "base": self.base.model_type,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "keys": list(self.key_shape),
            "segment_length": self.segment_length,
            "num_memory_tokens": self.num_memory_tokens,
        }

    def validate_architecture(self) -> None:
        """Sizes that must fit each other, and a model inside that can be wrapped."""
        for name in ("segment_length", "num_memory_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.backprop_segments is not None and self.backprop_segments < 1:
            raise ValueError(
                f"backprop_segments must be at least 1, or None, got {self.backprop_segments}"
            )
        kinds = set(getattr(self.base, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(self.base, "sliding_window", None):
            raise ValueError(
                f"{self.base.model_type} has layers that RMT cannot carry through a segment "
                f"({', '.join(sorted(kinds))}; sliding_window "
                f"{getattr(self.base, 'sliding_window', None)}): {INSTEAD}"
            )
        read = self.segment_length + 2 * self.num_memory_tokens
        longest = getattr(self.base, "max_position_embeddings", None)
        if longest is not None and read > longest:
            raise ValueError(
                f"a segment of {self.segment_length} tokens between two memories of "
                f"{self.num_memory_tokens} is {read} positions, but the model inside takes {longest}: "
                "choose a smaller segment_length"
            )
