"""bAbI stories (Weston et al., 2015) with their sentences scattered, in order, in real text.

A story's sentences stand at word boundaries of a window of text, then comes " Where is Mary? " and
the answer. The stories are read from the published files; nothing of them comes with everlong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .babi_story import Story
from .config import digest
from .haystack import TEST_SEED, Haystack, HaystackConfig, HaystackDataset, Sentence
from .text import load_text, split


@dataclass(frozen=True)
class BabiConfig(HaystackConfig):
    """Stories of bAbI in text; the other fields are those of `HaystackConfig`.

    folder: of the published files, qa1_..._train.txt and so on.
    tasks: which of them, such as qa1.
    max_facts: stories with more sentences before the question are left out.
    """

    task: Literal["babi"] = "babi"
    folder: str = ""
    tasks: list[str] = field(default_factory=lambda: ["qa1"])
    max_facts: int = 4

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("folder must name the folder of the bAbI files: --data.folder FOLDER")
        if not self.tasks:
            raise ValueError("tasks is empty: name at least one, such as qa1")
        if self.max_facts < 1:
            raise ValueError(f"max_facts must be at least 1, got {self.max_facts}")
        super().__post_init__()

    @property
    def longest_answer(self) -> int:
        """Tokens of an answer, at most."""
        return max(len(story.answer.encode()) for story in self.stories()[1])

    def stories(self) -> tuple[list[Story], list[Story]]:
        """For training, and held out: the last tenth of each file (`held_out`), or its test file."""
        train, test = [], []
        for task in self.tasks:
            [file] = _files(self.folder, task, "train")
            blocks = read_stories(file)
            held_out = _files(self.folder, task, "test")
            kept = len(blocks) if held_out else len(blocks) - round(self.held_out * len(blocks))
            train += blocks[:kept]
            test += read_stories(held_out[0]) if held_out else blocks[kept:]
        parts = [
            [story for block in blocks for story in block if len(story.facts) <= self.max_facts]
            for blocks in (train, test)
        ]
        if not all(parts):
            raise ValueError(
                f"{self.folder} has no story of {', '.join(self.tasks)} with at most "
                f"{self.max_facts} sentences to train on, or none to hold out: raise max_facts"
            )
        return parts[0], parts[1]

    def fingerprint(self) -> str:
        """A hash of the text and the stories."""
        known = f"{super().fingerprint()} {self.stories()!r}"
        return digest(known.encode())

    def datasets(
        self, num_samples: int, seed: int = 0, batch: int = 1, streams: int | None = None
    ) -> tuple[BabiDataset, BabiDataset]:
        """The training and the held-out data set; they share neither stories nor text."""
        documents = split(load_text(self.source), fraction=self.held_out)
        train, test = map(Haystack.of_bytes, documents)
        learnt, asked = self.stories()
        self.check_room(max(story.tokens for story in [*learnt, *asked]))
        full_length = replace(self, start_length=None)
        return (
            BabiDataset(train, self, num_samples, seed, batch, stories=learnt),
            BabiDataset(test, full_length, num_samples, TEST_SEED + seed, batch, stories=asked),
        )


class BabiDataset(HaystackDataset):
    """Samples of stories; each takes one at random."""

    def __init__(self, *args: Any, stories: Sequence[Story], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stories = stories

    def draft(
        self, rng: np.random.Generator, depth: float | None, length: int
    ) -> tuple[list[Sentence], int]:
        """The story's sentences in their order, then the question."""
        story = self.stories[int(rng.integers(len(self.stories)))]
        depths = np.sort(rng.random(len(story.facts)))
        if depth is not None:
            before, after = depths[: story.support], depths[story.support + 1 :]
            depths = np.concatenate([before * depth, [depth], depth + (1 - depth) * after])
        facts = [
            Sentence(float(at), f" {fact}".encode(), b"", b"", False)
            for at, fact in zip(depths, story.facts, strict=True)
        ]
        ask, answer = f" {story.question} ".encode(), story.answer.encode()
        return [*facts, Sentence(1.0, ask, answer, b"", True)], story.support


def read_stories(path: Path) -> list[list[Story]]:
    """The stories of a bAbI file: a list for each block of lines that are numbered from 1.

    Raises ValueError for a line that is not of bAbI.
    """
    blocks: list[list[Story]] = []
    numbers: list[int] = []
    facts: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"(\d+) ([^\t]+?)(?: ?\t([^\t]+)\t([\d ]+))?", line.rstrip())
        if found is None:
            raise ValueError(f"{path} is no file of bAbI: it has the line {line[:80]!r}")
        number, text, answer, supports = found.groups()
        if number == "1":
            blocks.append([])
            numbers, facts = [], []
        if answer is None:
            numbers.append(int(number))
            facts.append(text)
            continue
        rests_on = tuple(numbers.index(int(each)) for each in supports.split())
        blocks[-1].append(Story(tuple(facts), text.strip(), answer, rests_on))
    return blocks


def _files(folder: str, task: str, part: str) -> list[Path]:
    """The file of a task, qa1_..._train.txt; none for a test file that is not there."""
    found = sorted(Path(folder).glob(f"{task}_*_{part}.txt"))
    if len(found) == 1 or (part == "test" and not found):
        return found
    there = sorted({path.name.split("_")[0] for path in Path(folder).glob("qa*_train.txt")})
    raise ValueError(
        f"{folder} has {len(found)} files {task}_*_{part}.txt, not one"
        f"{': it has ' + ', '.join(there) if there else ': it has none of bAbI'}"
    )
