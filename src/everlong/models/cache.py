"""What a Titans model keeps between calls, as a `transformers` cache."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin


class StateLayer(CacheLayerMixin):
    """One layer's state: a pytree of tensors, batch first, or None before the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the layer makes its own state."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not how a memory is written."""
        raise TypeError("a Titans cache holds states, not keys and values: set `state` instead")

    def _map(self, function: Any) -> None:
        self.state = pytree.tree_map_only(Tensor, function, self.state)

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
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """A memory cannot forget its last tokens."""
        if tokens_to_remove:
            raise ValueError(
                "a neural memory cannot be cropped: keep a copy of the cache from before the tokens "
                "(copy.deepcopy) and continue from that"
            )

    def offload(self) -> None:
        """Move the state to the CPU."""
        raise ValueError("offloading a Titans cache is not supported: its size is constant")

    def prefetch(self) -> None:
        """Move the state back."""
        raise ValueError("offloading a Titans cache is not supported: its size is constant")


class TitansCache(Cache):
    """A state for each layer; `past_key_values` of one call continues in the next."""

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[StateLayer() for _ in range(num_hidden_layers)])

    @property
    def batch_size(self) -> int:
        """Rows of the states, or -1 before the first call."""
        state = self.layers[0].state
        return -1 if state is None else pytree.tree_leaves(state)[0].shape[0]

    def detach(self) -> "TitansCache":
        """Cut the history of every state, in place: gradients stop here. Returns itself."""
        for layer in self.layers:
            layer._map(torch.Tensor.detach)
        return self
