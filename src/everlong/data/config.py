"""What every training task says of itself: its lengths, its tokens and its data sets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LENGTH_STEP = 32
LONGEST, MOST_SAMPLES = 1 << 26, 1 << 20  # tokens that are read in days; texts that fit into a memory
IGNORE = -100  # the label of a token that is not to be predicted


def digest(data: bytes) -> str:
    """A hash of some bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class DataConfig:
    """The lengths of a task's samples.

    length: tokens of a sample, all told.
    start_length, hold_steps, growth_steps: if given, the length stays at start_length for hold_steps,
        then grows geometrically to `length` in growth_steps, in multiples of 32.
    """

    length: int = 512
    start_length: int | None = None
    hold_steps: int = 0
    growth_steps: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if self.length > LONGEST:
            raise ValueError(f"length must be at most {LONGEST:,} tokens, got {self.length:,}")
        if self.start_length is not None and not 0 < self.start_length <= self.length:
            raise ValueError(
                f"start_length must lie in 1 ... length = {self.length}, got {self.start_length}"
            )
        if self.hold_steps < 0 or self.growth_steps < 0:
            raise ValueError(
                "hold_steps and growth_steps must be at least 0, "
                f"got {self.hold_steps} and {self.growth_steps}"
            )

    def length_at(self, step: int) -> int:
        """Tokens of the samples of training step `step`, counted from 0."""
        grown = step - self.hold_steps
        if self.start_length is None or grown >= self.growth_steps:
            return self.length
        growth = (self.length / self.start_length) ** (max(grown, 0) / self.growth_steps)
        rounded = round(self.start_length * growth / LENGTH_STEP) * LENGTH_STEP
        return min(max(rounded, self.start_length), self.length)

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of its samples; models get its vocabulary, run folders keep it."""
        from .tokenizer import byte_tokenizer

        return byte_tokenizer()

    def datasets(
        self, num_samples: int, seed: int = 0, batch: int = 1, streams: int | None = None
    ) -> tuple[Any, Dataset]:
        """The training and the held-out data set; they share no document.

        num_samples: of training. batch: samples of a training step. streams: how many rows are read
        at once, all processes together (`batch` if not given), for a task whose rows go on from one
        call to the next. An item has at least input_ids and labels, [T] each.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A short text that changes when the data behind this configuration do."""
        raise NotImplementedError
