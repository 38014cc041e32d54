"""What a model with a memory keeps between calls, as a `transformers` cache."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from everlong.ops.state import (
    ANOTHER,
    MOST_TOKENS,
    State,
    check_kind,
    check_same_place,
    format_bytes,
    load_states,
    save_states,
)


class StateLayer(CacheLayerMixin):
    """One layer's state, or None before the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the layer makes its own state."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not how a memory is written."""
        raise TypeError("a memory's cache holds states, not keys and values: set `state` instead")

    def get_seq_length(self) -> int:
        """Columns read so far, pads included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over past and new columns."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Back to an empty memory."""
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows change places, as beam search wants."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows with these indices, in this order."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        if self.state is not None:
            self.state = self.state.repeat(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """A memory cannot forget its last tokens."""
        if tokens_to_remove:
            raise ValueError(
                "a neural memory cannot be cropped: keep a copy of the cache from before the tokens "
                "(cache.copy()) and continue from that"
            )

    def offload(self) -> None:
        """Move the state to the CPU."""
        raise ValueError("offloading a memory's cache is not supported: its size is constant")

    def prefetch(self) -> None:
        """Move the state back."""
        raise ValueError("offloading a memory's cache is not supported: its size is constant")


UNTOLD = ("rope_theta",)  # by caches of earlier versions
TAIL = 16  # ids of a text by which it is known again


class MemoryCache(Cache):
    """A state for each layer; `past_key_values` of one call continues in the next."""

    def __init__(self, num_hidden_layers: int, made_by: dict[str, Any] | None = None) -> None:
        super().__init__(layers=[StateLayer() for _ in range(num_hidden_layers)])
        self.made_by = made_by  # what `state_fields` of the model's configuration says
        self.tail: Tensor | None = None  # the last `TAIL` ids of each row; None: not known

    def check(self, made_by: dict[str, Any]) -> None:
        """Refuse a cache that a model with other states has filled; note who fills an empty one."""
        if self.made_by is None:
            self.made_by = made_by
        if self.made_by == made_by:
            return
        made_by = {
            name: made_by[name] for name in made_by if name in self.made_by or name not in UNTOLD
        }
        default = "the default"  # of a field that is told only where it differs from that
        pairs = {
            name: (self.made_by.get(name, default), made_by.get(name, default))
            for name in made_by | self.made_by
        }
        wrong = [
            f"{name} {held} instead of {own}" for name, (held, own) in pairs.items() if held != own
        ]
        if wrong:
            raise ValueError(f"the cache belongs to another model, with {', '.join(wrong)}")

    def check_states(self) -> None:
        """Raise ValueError unless every state is right in itself, and all have read the same tokens."""
        states = [layer.state for layer in self.layers if layer.state is not None]
        for state in states:
            check_kind("layers", state, State)
            state.check()
        if not self.layers:
            raise ValueError(f"a cache has a state for each layer, got none: {ANOTHER}")
        # Numbers are compared one by one: a compiler would make a program for each set of them.
        seen = self.layers[0].seen
        counts = [layer.seen for layer in self.layers]
        whole = all(isinstance(count, int) for count in counts) and 0 <= seen < MOST_TOKENS
        if not whole or any(count != seen for count in counts):
            raise ValueError(f"the layers of a cache have read as many tokens as each other: {ANOTHER}")
        missing = len(states) not in (0, len(self.layers)) or (seen > 0 and not states)
        if missing or any(state.batch_size != states[0].batch_size for state in states):
            raise ValueError(
                "a cache has a state for each layer, of the same rows, got rows "
                f"{[state.batch_size for state in states]} for {len(self.layers)} layers: {ANOTHER}"
            )
        check_same_place(*(state.place for state in states))

    def note_ids(self, ids: Tensor | None, tokens: int) -> None:
        """Keep the end of the text, ids [B, tokens] being the last of it (None: embeddings)."""
        before = self.tail
        if self.get_seq_length() > tokens and tokens < TAIL:
            known = before is not None and ids is not None and len(before) == len(ids)
            ids = torch.cat([before, ids], 1) if known else None  # type: ignore[list-item]
        self.tail = None if ids is None else ids[:, -TAIL:]
        if self.tail is not None and tokens > TAIL:  # or a few would hold the memory of all
            self.tail = self.tail.clone()

    @property
    def batch_size(self) -> int:
        """Rows of the states, or -1 before the first call."""
        state = self.layers[0].state if self.layers else None
        return -1 if state is None else state.batch_size

    @property
    def nbytes(self) -> int:
        """What the states hold, in bytes."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)

    def __repr__(self) -> str:
        kinds = Counter(type(layer.state).__name__ for layer in self.layers if layer.state is not None)
        states = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "empty"
        width = (self.made_by or {}).get("hidden_size", "unknown")
        return (
            f"MemoryCache({self.get_seq_length():,} tokens read, {max(self.batch_size, 0)} rows, "
            f"{states}, {format_bytes(self.nbytes)}, made by a model of width {width})"
        )

    def detach(self) -> "MemoryCache":
        """Cut the history of every state, in place: gradients stop here. Returns itself."""
        for layer in self.layers:
            layer.state = None if layer.state is None else layer.state.detach()
        return self

    def copy(self) -> "MemoryCache":
        """Another cache at the same place, without history; what one reads the other does not see."""
        new = MemoryCache(len(self.layers), self.made_by)
        new.tail = self.tail
        for mine, its in zip(self.layers, new.layers, strict=True):
            its.seen = mine.seen
            its.state = None if mine.state is None else mine.state.detach()
        return new

    def to(self, device: torch.device | str) -> "MemoryCache":
        """Move every state to a device, in place. Returns itself."""
        for layer in self.layers:
            layer.state = None if layer.state is None else layer.state.to(device)
        return self

    def save(self, path: str | Path) -> None:
        """Write all states to one safetensors file: the memory apart from the model."""
        layers = [[layer.seen, layer.state] for layer in self.layers]
        save_states({"made_by": json.dumps(self.made_by), "layers": layers}, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "MemoryCache":
        """Read what `save` wrote.

        Raises FileNotFoundError, or ValueError when the file is damaged or holds something else.
        """
        held = load_states(path)
        if not isinstance(held, dict):
            raise ValueError(f"{path} holds the state of one layer, not the cache of a model")
        try:
            cache = cls(len(held["layers"]), json.loads(held["made_by"]))
            for layer, (seen, state) in zip(cache.layers, held["layers"], strict=True):
                layer.seen, layer.state = seen, state
            if cache.made_by is not None:
                check_kind("made_by", cache.made_by, dict)
            cache.check_states()
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged, or no cache of a model: {error}") from error
        return cache.to(device)
