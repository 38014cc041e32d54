"""Configuration of RMT: a causal language model of `transformers` that reads in segments."""

import difflib
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from everlong.models.configuration import checked, fractional_fields, known_fields

# What RMT has been tried around: every layer keeps the keys and values of all it read, no token sees
# the future, and the head is one matrix. Others may do too; some, such as bert, only look as if.
KINDS = (
    "llama",
    "gpt2",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "olmo",
    "olmo2",
    "gemma",
    "bloom",
    "biogpt",
)
INSTEAD = f"RMT wraps {', '.join(KINDS)}"
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@checked
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
        base: Any = {"model_type": "llama"} if self.base_config is None else self.base_config
        kind = base.get("model_type") if isinstance(base, dict) else base.model_type
        if kind not in KINDS:
            raise ValueError(f"a model of type {kind!r} cannot be in base_config: {INSTEAD}")
        # Fields that every model has are the inner one's.
        vocab_size = kwargs.pop("vocab_size", None)
        if isinstance(base, dict):
            fields = {k: v for k, v in base.items() if k != "model_type"}
            if vocab_size is not None:
                fields.setdefault("vocab_size", vocab_size)
            base = CONFIG_MAPPING[kind](**_inner_fields(CONFIG_MAPPING[kind], fields))
        if vocab_size not in (None, base.vocab_size):
            raise ValueError(
                f"vocab_size is {vocab_size}, but {base.vocab_size} in base_config: leave one out"
            )
        self.base_config = base
        self.tie_word_embeddings = bool(base.tie_word_embeddings)
        for name in TOKENS:
            if name in kwargs:
                setattr(base, name, kwargs[name])
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
        if kinds != {"full_attention"}:
            raise ValueError(
                f"layers of {', '.join(sorted(kinds))} cannot be carried through a segment: give the "
                "model inside layer_types of full_attention alone"
            )
        read = self.segment_length + 2 * self.num_memory_tokens
        longest = getattr(self.base, "max_position_embeddings", None)
        if longest is not None and read > longest:
            raise ValueError(
                f"a segment of {self.segment_length} tokens between two memories of "
                f"{self.num_memory_tokens} is {read} positions, but the model inside takes {longest}: "
                "choose a smaller segment_length"
            )
        check_rotary(self.base, read)


def _inner_fields(cls: type[PreTrainedConfig], fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of the model inside, whole numbers where they may be. Names that are all but one of its
    own are refused; others, which files on a hub have of anything, do no harm."""
    known, fractions = known_fields(cls), fractional_fields(cls)
    for name in (name for name in fields.keys() - known if not name.startswith("_")):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near:
            raise ValueError(f"unknown field base_config.{name}: did you mean base_config.{near[0]}?")
    return {n: float(v) if n in fractions and type(v) is int else v for n, v in fields.items()}


def check_rotary(config: Any, read: int) -> None:
    """Refuse rotary frequencies that change with the text's length, where `read` positions change them:
    a later token would change what came before."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("dynamic", "longrope"):
        return
    longest = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if read > longest:
        raise ValueError(
            f"rope_type {kind!r} changes its frequencies beyond {longest} positions: later tokens "
            f"would change earlier ones. A segment has {read}: choose a smaller segment_length"
        )
