"""BABILong (Kuratov et al., 2024): the sentences of a bAbI story, in order, among those of a long text.

Stories are told by `simulate`, as many as wanted; the text is any source. A sample is
"... Mary moved to the bathroom. ... Where is Mary? bathroom.", in tokens of any tokenizer.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .babi_story import Story
from .babi_world import simulate
from .config import digest
from .corpus import cache_home
from .haystack import (
    TEST_SEED,
    Haystack,
    HaystackConfig,
    HaystackDataset,
    Sentence,
)
from .ruler import Coder
from .text import Document, load_text, split
from .tokenizer import BYTES, encode_bytes, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TASKS = tuple(f"qa{number}" for number in range(1, 11))
BPE = "bpe"
ABOUT = "tokenizer_config.json"
TRIES = 1000


@dataclass(frozen=True)
class BabilongConfig(HaystackConfig):
    """Stories of bAbI among the sentences of a text; the other fields are those of `HaystackConfig`.

    tasks: which of qa1 ... qa10; each sample takes one of them.
    tokenizer: "bytes"; "bpe": one of `vocabulary` tokens, trained on the text and on stories and kept
        for the next time; or a folder or hub id for `AutoTokenizer`.
    ask: "last", one question at the end; "all", also those that the story asks on its way, each with
        its answer, which gives training more to learn from.
    together: share of the training samples whose story stands in one piece at the end.
    """

    task: Literal["babilong"] = "babilong"
    tasks: list[str] = field(default_factory=lambda: list(TASKS[:5]))
    tokenizer: str = BPE
    vocabulary: int = 2048
    ask: Literal["last", "all"] = "all"
    together: float = 0.25

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks are some of {', '.join(TASKS)}, got {self.tasks}")
        if not 0 <= self.together <= 1:
            raise ValueError(f"together is a share of the samples, in [0, 1], got {self.together}")
        super().__post_init__()

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer by name."""
        if self.tokenizer != BPE:
            return load_tokenizer(self.tokenizer)
        key = f"1 {HaystackConfig.fingerprint(self)} {self.held_out} {self.tasks} {self.vocabulary}"
        folder = cache_home() / "tokenizers" / digest(key.encode())
        if not (folder / ABOUT).is_file():
            documents = split(load_text(self.source), fraction=self.held_out)[0]
            tokenizer = train_tokenizer(self._texts(documents), self.vocabulary)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                tokenizer.save_pretrained(aside)
                # Last the one that says that the others are there.
                for file in sorted(Path(aside).iterdir(), key=lambda path: path.name == ABOUT):
                    os.replace(file, folder / file.name)
        return load_tokenizer(str(folder))

    def _texts(self, documents: Sequence[Document]) -> Iterator[str]:
        """What a tokenizer is trained on: the text, and for each task so many stories."""
        rng = np.random.default_rng(0)
        for task in self.tasks:
            for _ in range(300):
                last = simulate(task, rng)[-1]
                yield " ".join(["", *last.facts, last.question, f"{last.answer}."])
        for document in documents:
            yield " ".join(_sentences(document.text.decode()))

    def plain(self) -> BabilongConfig:
        """The task to judge by: one question, its story anywhere."""
        return replace(super().plain(), ask="last", together=0.0)

    def fingerprint(self) -> str:
        """A hash of the text and of some stories."""
        stories = [simulate(task, np.random.default_rng(0)) for task in self.tasks]
        return digest(f"{super().fingerprint()} {stories!r}".encode())

    def datasets(
        self, num_samples: int, seed: int = 0, batch: int = 1, streams: int | None = None
    ) -> tuple[BabilongDataset, BabilongDataset]:
        """The training and the held-out data set; they share neither stories nor text."""
        tokenizer = None if self.tokenizer == BYTES else self.build_tokenizer()
        train, _ = split(load_text(self.source), fraction=self.held_out)
        return (
            self._over(train, tokenizer, num_samples, seed, batch),
            self.held_out_data(tokenizer, num_samples, seed, batch),
        )

    def held_out_data(
        self,
        tokenizer: PreTrainedTokenizerFast | None,
        num_samples: int,
        seed: int = 0,
        batch: int = 1,
    ) -> BabilongDataset:
        """The held-out data set in the tokens of a tokenizer; None: bytes."""
        _, test = split(load_text(self.source), fraction=self.held_out)
        plain = replace(self, start_length=None)
        return plain._over(test, tokenizer, num_samples, TEST_SEED + seed, batch)

    def _over(
        self,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerFast | None,
        num_samples: int,
        seed: int,
        batch: int,
    ) -> BabilongDataset:
        haystack, encode = _haystack(documents, tokenizer), _encoder(tokenizer)
        return BabilongDataset(haystack, self, num_samples, seed, batch, encode)


class BabilongDataset(HaystackDataset):
    """Samples of simulated stories."""

    config: BabilongConfig

    def draft(
        self, rng: np.random.Generator, depth: float | None, length: int
    ) -> tuple[list[Sentence], int]:
        """The story's sentences in their order, with the questions among them, the last one last."""
        asked = self._story(rng, length)
        story = asked[-1]
        sentences, place = self._facts(rng, asked, depth)
        return [*sentences, _question(story, 1.0)], place

    def context(self, index: int, length: int) -> tuple[np.ndarray, Story, float]:
        """What a reader is given before the question of sample `index`: its tokens, `length` of them
        (0: the facts alone); the story; and the place in [0, 1] of the last fact that matters."""
        rng = np.random.default_rng((self.seed, index))
        asked = self._story(rng, length)
        sentences, place = self._facts(rng, asked, None)
        sample = self.assemble(rng, sentences, place, length)
        return sample["input_ids"].numpy(), asked[-1], sample["depth"]

    def start(self, place: int, length: int) -> int:
        """So that the window ends where a sentence does: what stands behind it is no part of one."""
        size = len(self.haystack.tokens)
        return (self.haystack.place((place + length) % size) - length) % size

    def _story(self, rng: np.random.Generator, length: int) -> list[Story]:
        """A question of a story that fits into so many tokens (0: any), behind those that are asked
        before it."""
        config = self.config
        task = config.tasks[int(rng.integers(len(config.tasks)))]
        for _ in range(TRIES):
            block = simulate(task, rng)
            number = int(rng.integers(len(block)))
            asked = block[: number + 1] if config.ask == "all" else [block[number]]
            if not length or self._tokens(asked) < length:
                return asked
        raise ValueError(
            f"length {length} is too short: of {TRIES:,} stories of {task} none fits; take a longer "
            "one or other tasks"
        )

    def _facts(
        self, rng: np.random.Generator, asked: Sequence[Story], depth: float | None
    ) -> tuple[list[Sentence], int]:
        """The sentences before the last question, each at its depth, and the one that answers it."""
        story = asked[-1]
        depths = np.sort(rng.random(len(story.facts)))
        if rng.random() < self.config.together:
            depths[:] = 1.0
        if depth is not None:
            before, after = depths[: story.support], depths[story.support + 1 :]
            depths = np.concatenate([before * depth, [depth], depth + (1 - depth) * after])
        questions = {len(each.facts): each for each in asked[:-1]}
        sentences: list[Sentence] = []
        place = 0
        for i, (at, fact) in enumerate(zip(depths, story.facts, strict=True)):
            if i == story.support:
                place = len(sentences)
            sentences.append(Sentence(float(at), f" {fact}".encode(), b"", b"", False))
            if i + 1 in questions:
                sentences.append(_question(questions[i + 1], float(at)))
        return sentences, place

    def _tokens(self, asked: Sequence[Story]) -> int:
        """Tokens of all facts and questions."""
        texts = [f" {fact}" for fact in asked[-1].facts]
        texts += [f" {story.question} {story.answer}." for story in asked]
        return sum(len(self.encode(text.encode())) for text in texts)


def _question(story: Story, depth: float) -> Sentence:
    return Sentence(depth, f" {story.question}".encode(), f" {story.answer}.".encode(), b"", True)


def _sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line, without the blank before it."""
    return [each for each in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text.strip())) if each]


def _haystack(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast | None) -> Haystack:
    """The sentences of the documents as tokens; a story's may stand between any two."""
    texts = [f" {each}" for one in documents for each in _sentences(one.text.decode())]
    if tokenizer is None:
        rows = [encode_bytes(text) for text in texts]
    else:
        rows = [np.array(ids, np.int32) for ids in Coder(tokenizer).many(texts)]
    ends = np.cumsum([len(row) for row in rows])
    return Haystack(np.concatenate(rows), np.concatenate([[0], ends[:-1]]))


def _encoder(tokenizer: PreTrainedTokenizerFast | None) -> Any:
    """What gives the tokens of a sentence."""
    return encode_bytes if tokenizer is None else _Encoder(Coder(tokenizer))


class _Encoder:
    """The tokens of a sentence; the same ones come again and again."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.known = lru_cache(maxsize=50_000)(self._encode)

    def __reduce__(self) -> tuple[type, tuple[Coder]]:
        return _Encoder, (self.coder,)  # another process remembers its own

    def __call__(self, text: bytes) -> np.ndarray:
        return self.known(text)

    def _encode(self, text: bytes) -> np.ndarray:
        return np.array(self.coder.ids(text.decode()), np.int32)
