"""Configuration of LM2: a Llama with a gated memory bank."""

from typing import Any

from transformers import LlamaConfig

from everlong.models.configuration import checked
from everlong.models.configuration_rmt import check_rotary
from everlong.models.presets import lm2_preset_fields

ADDRESSINGS = ("slots", "positions", "released")
STATE_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_key_value_heads",
    "head_dim",
    "segment_length",
    "memory_layers",
    "memory_addressing",
    "num_memory_slots",
    "num_memory_heads",
)


@checked
class LM2Config(LlamaConfig):
    """A Llama whose text goes by in segments, with a bank of slots beside the attention of some layers.

    Self-attention sees its own segment alone, and positions start anew in each; what came before is
    in the bank.

    Args:
        segment_length: tokens of a segment.
        memory_layers: the layers with a bank: the first n, or a list of their numbers; None: all.
        memory_addressing: `"slots"`: every token reads all slots, and a segment's end writes them;
            `"positions"`: the paper's equations to the letter, slot i for place i of a segment, one
            bank for all layers; `"released"`: the same as in the authors' code.
        num_memory_slots: R; segment_length unless the addressing is `"slots"`.
        num_memory_heads: heads of the attention over the slots; divides hidden_size.
        memory_top_k: slots that a token reads, its best ones; None: all.
        initial_memory_scale: start of a learned factor a channel on what is read; None: no factor. At
            0 the model starts as the Llama that it is without the bank.
        identity_slots: `"slots"`: slot r starts as row r of the identity, as in the paper; else every
            slot starts as a learned row.
        initial_memory_forget: `"slots"`: what a slot of a fresh model keeps at a segment's end.
        backprop_segments: gradients are cut at every so many segments, and at the start of a call that
            goes on from a cache; None: never.
        The rest: as in Llama.
    """

    model_type = "lm2"

    segment_length: int = 2048
    memory_layers: int | list[int] | None = None
    memory_addressing: str = "slots"
    num_memory_slots: int | None = None
    num_memory_heads: int = 1
    memory_top_k: int | None = None
    initial_memory_scale: float | None = None
    identity_slots: bool = False
    initial_memory_forget: float = 0.75
    backprop_segments: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_memory_slots is None:
            self.num_memory_slots = self.segment_length
        if self.memory_layers is None:
            self.memory_layers = self.num_hidden_layers
        if isinstance(self.memory_layers, int) and self.memory_layers >= 0:
            self.memory_layers = list(range(self.memory_layers))
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> "LM2Config":
        """The configuration of a named size, such as "lm2-1.7b"; `fields` change it.

        Parameters of "lm2-1.7b": 1.64 billion with `"positions"` (the paper's equations), 1.77 with
        `"released"`, 1.91 with `"slots"`.
        """
        return cls(**(lm2_preset_fields(name) | fields))

    def state_fields(self) -> dict[str, Any]:
        """What decides whether a cache of one model fits another."""
        return {name: getattr(self, name) for name in STATE_FIELDS}

    def validate_architecture(self) -> None:
        """Sizes that must fit each other."""
        super().validate_architecture()
        for name in ("segment_length", "num_memory_slots", "num_memory_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("memory_top_k", "backprop_segments"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        if self.memory_addressing not in ADDRESSINGS:
            raise ValueError(
                f"unknown memory_addressing {self.memory_addressing!r}: use {', '.join(ADDRESSINGS)}"
            )
        layers = self.memory_layers
        if isinstance(layers, int):
            raise ValueError(f"memory_layers must be a number of layers or a list, got {layers}")
        assert layers is not None
        if sorted(set(layers)) != layers or not all(0 <= n < self.num_hidden_layers for n in layers):
            raise ValueError(
                f"memory_layers must be numbers from 0 to {self.num_hidden_layers - 1}, each once and "
                f"in their order, got {layers}"
            )
        if self.memory_addressing != "slots" and self.num_memory_slots != self.segment_length:
            raise ValueError(
                f"memory_addressing {self.memory_addressing!r} has a slot for each place of a segment: "
                f"num_memory_slots ({self.num_memory_slots}) must be segment_length "
                f"({self.segment_length}), or take 'slots'"
            )
        if self.hidden_size % self.num_memory_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_memory_heads "
                f"({self.num_memory_heads})"
            )
        check_rotary(self, self.segment_length)
        if not 0 < self.initial_memory_forget < 1:
            raise ValueError(
                f"initial_memory_forget must lie between 0 and 1, got {self.initial_memory_forget}"
            )
