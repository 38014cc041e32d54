"""Configuration of the Titans models."""

from typing import Any

from transformers import PreTrainedConfig

from everlong.layers.neural_memory import initial_gates
from everlong.models.configuration import checked
from everlong.models.presets import preset_fields

STATE_FIELDS = (
    "layer_types",
    "hidden_size",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "segment_length",
    "num_persistent_tokens",
    "num_memory_heads",
    "memory_head_dim",
    "memory_depth",
    "memory_expansion",
    "chunk_size",
    "conv_kernel",
    "memory_momentum",
    "memory_decay",
    "memory_residual_norm",
    "rope_theta",
)
# What came after the first models were saved, with what they are: a file that lacks it means this.
OLDER = {
    "gate_act": "sigmoid",
    "mac_residual": False,
    "memory_forget": "all",
    "memory_unit_scale": False,
    "memory_normalize_values": False,
    "memory_gate_by_key": False,
    "memory_write_threshold": 0.0,
}
LAYER_TYPES = ("lmm", "mac", "mag", "mal", "sliding_attention", "full_attention")


@checked
class TitansConfig(PreTrainedConfig):
    """A decoder whose layers are named one by one in `layer_types`.

    `"lmm"` is the neural memory alone; `"mac"` reads it as context of the attention in a segment,
    `"mag"` lets it gate a sliding window, `"mal"` puts it before one; `"sliding_attention"` and
    `"full_attention"` are a Llama layer with and without a window. The rest is Llama: RMSNorm, rotary
    positions, SwiGLU, residuals.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
        num_key_value_heads, head_dim, hidden_act, initializer_range, rms_norm_eps,
        max_position_embeddings, tie_word_embeddings, rope_theta: as in Llama.
        layer_types: a type for each layer; default: all `"lmm"`.
        sliding_window: tokens that a token sees in `"sliding_attention"`, `"mag"` and `"mal"` layers,
            itself included.
        segment_length: tokens of a segment in `"mac"` layers; chunk_size divides it.
        num_persistent_tokens: learned rows at the start of every document, in each layer with a
            memory; 0 leaves them out.
        num_memory_heads: memories side by side in a layer; default num_attention_heads.
        memory_head_dim: key and value size of a memory; default hidden_size // num_memory_heads.
        memory_depth: layers of the memory network (1 is the linear memory).
        memory_expansion: hidden width of the memory network, in multiples of memory_head_dim.
        chunk_size: tokens whose inner gradients are taken at one point.
        conv_kernel: taps of the convolution after the memory's projections; 0 leaves it out.
        memory_momentum, memory_decay: False leaves out the momentum or the forgetting.
        memory_forget: which layers of the memory network forget, "all" or the "last".
        memory_residual_norm: M(x) = x + LN(MLP(x)); False is the plain MLP, which may diverge.
        mac_residual: what `"mac"` absorbs is norm(x + Attn(...)), so that a token is there from the
            first step; False leaves out x, as v1 eq. 24 has it to the letter.
        gate_act: what the memory's normed output goes through before it multiplies the attention's, in
            `"mac"` and `"mag"`: "silu" or "sigmoid".
        memory_unit_scale, memory_norm_floor, memory_normalize_values: how a fresh memory and its steps
            are scaled (see `NeuralMemory`). False, any and False are the start of models saved before
            these fields were there, with max_memory_learning_rate 2, initial_alpha 1e-4 and
            initial_theta 0.5.
        max_memory_learning_rate: upper end of theta (see `NeuralMemory`); where initial_theta of it is
            above 2, a fresh memory is beyond the stability of its own gradient descent.
        memory_gate_by_key: how strongly a token is written depends on its key too, and so on what the
            convolution has seen before it; False: on the token alone.
        memory_write_threshold: in [0, 1): what is written more faintly than this share of the upper
            end is not written at all, in training too, where the loss reaches the gates as without it.
            What is not written costs nothing; the price's gradient there is that at 0: it closes them.
        memory_read_only: the memory is never written: every token reads it as training left it.
        backprop_segments: gradients are cut at every so many segments of segment_length tokens, and
            at the start of a call that goes on from a cache; None: never.
        memory_write_cost: price on writing, added to the training loss (not to the evaluation loss):
            this times the mean over all memories of log(1 + s / 0.001), s being theta's gate, a
            share of its upper end, and times exp(-loss) of the row, without a gradient: the price
            waits until the lesson is learned. A memory that pays for what it writes leaves alone
            what nobody asks for, and keeps longer.
        initial_alpha, initial_eta, initial_theta: the gates of a fresh model (theta's as a share of
            its upper end; alpha's, with memory_unit_scale, is shared out among the layers that forget);
            two values of alpha go from the first head's to the last's, in equal ratios.
            0.01 keeps what was read for a hundred tokens; where that is too short, the gates learn it.
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    layer_types: list[str] | None = None
    sliding_window: int = 2048
    segment_length: int = 512
    num_persistent_tokens: int = 16
    num_memory_heads: int | None = None
    memory_head_dim: int | None = None
    memory_depth: int = 2
    memory_expansion: int = 4
    chunk_size: int = 64
    conv_kernel: int = 4
    memory_momentum: bool = True
    memory_decay: bool = True
    memory_forget: str = "all"
    memory_residual_norm: bool = True
    mac_residual: bool = True
    gate_act: str = "silu"
    memory_unit_scale: bool = True
    memory_norm_floor: float = 0.7
    memory_normalize_values: bool = True
    memory_gate_by_key: bool = False
    memory_write_threshold: float = 0.0
    max_memory_learning_rate: float = 1.2
    initial_alpha: float | list[float] = 0.01
    initial_eta: float = 0.5
    initial_theta: float = 0.8
    memory_read_only: bool = False
    memory_write_cost: float = 0.0
    backprop_segments: int | None = None
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1 << 30
    rope_theta: float = 10000.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = ["lmm"] * self.num_hidden_layers
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.num_memory_heads is None:
            self.num_memory_heads = self.num_attention_heads
        heads = self.num_memory_heads
        if self.memory_head_dim is None and heads > 0 and self.hidden_size % heads == 0:
            self.memory_head_dim = self.hidden_size // heads
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> "TitansConfig":
        """The configuration of a size of the paper, such as "titans-mag-340m"; `fields` change it.

        Raises ValueError, with the names there are, for an unknown one.
        """
        return cls(**(preset_fields(name) | fields))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in `transformers`; the file of an older model means what it meant."""
        if "transformers_version" in config_dict:  # it was saved
            config_dict = OLDER | config_dict
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As in `transformers`; the file of an older model means what it meant."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def state_fields(self) -> dict[str, Any]:
        """What decides whether a cache of one model fits another."""
        newer = [name for name, older in OLDER.items() if getattr(self, name) != older]
        return {name: getattr(self, name) for name in (*STATE_FIELDS, *newer)}

    def validate_layer_type(self) -> None:
        """The types are ours, not only those that `transformers` knows."""
        layer_types = self.layer_types or []
        unknown = sorted(set(layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"unknown layer_types {unknown}: use {', '.join(LAYER_TYPES)}")
        if len(layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(layer_types)} layers but num_hidden_layers is "
                f"{self.num_hidden_layers}: name one type for each layer"
            )

    def validate_architecture(self) -> None:
        """Sizes that must divide each other."""
        for name, least in (
            ("vocab_size", 1),
            ("hidden_size", 1),
            ("intermediate_size", 1),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 1),
            ("num_key_value_heads", 1),
            ("head_dim", 1),
            ("num_memory_heads", 1),
            ("memory_head_dim", 1),
            ("memory_depth", 1),
            ("memory_expansion", 1),
            ("chunk_size", 1),
            ("conv_kernel", 0),
            ("sliding_window", 1),
            ("segment_length", 1),
            ("num_persistent_tokens", 0),
            ("backprop_segments", 1),
            ("memory_write_cost", 0),
            ("rms_norm_eps", 0),
            ("initializer_range", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.memory_forget not in ("all", "last"):
            raise ValueError(f'memory_forget must be "all" or "last", got {self.memory_forget!r}')
        if self.gate_act not in ("silu", "sigmoid"):
            raise ValueError(f'gate_act must be "silu" or "sigmoid", got {self.gate_act!r}')
        for name in ("memory_norm_floor", "max_memory_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.memory_write_threshold < 1:
            raise ValueError(
                f"memory_write_threshold must lie in [0, 1), got {self.memory_write_threshold}"
            )
        initial_gates(1, self.initial_alpha, self.initial_eta, self.initial_theta)
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be above 0, got {self.rope_theta}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id ({self.pad_token_id}) is no token of a vocabulary of {self.vocab_size}"
            )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads ({heads})"
            )
        if groups and heads % groups:
            raise ValueError(
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
            )
        if self.memory_head_dim is None:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_memory_heads "
                f"({self.num_memory_heads}): change one of them or give memory_head_dim"
            )
        if self.head_dim and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if "mac" in (self.layer_types or []) and self.segment_length % self.chunk_size:
            raise ValueError(
                f"segment_length ({self.segment_length}) is not a multiple of chunk_size "
                f"({self.chunk_size}): a segment of mac ends with a chunk"
            )
