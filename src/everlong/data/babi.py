"""bAbI stories (Weston et al., 2015) with their sentences scattered, in order, in real text.

A story's sentences stand at word boundaries of a window of text, then comes " Where is Mary? " and
the answer. The stories are simulated, as many as wanted, or read from the published files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from .babi_files import find_files, read_stories
from .babi_story import Story
from .babi_world import QUESTIONS, TASKS, narrate
from .config import digest
from .haystack import TEST_SEED, Haystack, HaystackConfig, HaystackDataset, Sentence
from .text import load_text, split

LONGEST_ANSWER = len("apple,football,milk")
LONGEST_WORD = len("bathroom")
TRIES = 1000


@dataclass(frozen=True)
class BabiConfig(HaystackConfig):
    """Stories of bAbI in text; the other fields are those of `HaystackConfig`.

    folder: of the published files, qa1_..._train.txt and so on; "" simulates the stories.
    tasks: which of qa1 to qa10.
    max_facts: stories with more sentences before the question are left out.
    """

    task: Literal["babi"] = "babi"
    folder: str = ""
    tasks: list[str] = field(default_factory=lambda: ["qa1"])
    max_facts: int = 4

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty: name at least one, such as qa1")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown and not self.folder:
            raise ValueError(f"tasks are some of {', '.join(TASKS)}, got {', '.join(unknown)}")
        if self.max_facts < 1:
            raise ValueError(f"max_facts must be at least 1, got {self.max_facts}")
        super().__post_init__()

    @property
    def longest_answer(self) -> int:
        """Tokens of an answer, at most."""
        if not self.folder:
            return LONGEST_ANSWER if "qa8" in self.tasks else LONGEST_WORD
        return max(len(story.answer.encode()) for story in self.stories()[1])

    def story(self, rng: np.random.Generator, length: int = 0) -> Story:
        """A simulated story of one of the tasks with at most `max_facts` sentences.

        length: tokens (bytes) that it must fit into; 0: any number.
        """
        for _ in range(TRIES):
            task = self.tasks[int(rng.integers(len(self.tasks)))]
            # As in a file, each question of a block is as likely as the others.
            number = int(rng.integers(1 if task == "qa4" else QUESTIONS))
            for i, story in enumerate(narrate(task, rng)):
                if len(story.facts) > self.max_facts or (length and story.tokens >= length):
                    break
                if i == number:
                    return story
        raise ValueError(
            f"of {TRIES:,} stories of {', '.join(self.tasks)}, none has at most {self.max_facts} "
            f"sentences{f' and fits into {length} tokens' if length else ''}: raise max_facts or length"
        )

    def stories(self) -> tuple[list[Story], list[Story]]:
        """Those of the files, for training and held out: the last tenth of each file (`held_out`), or
        its test file."""
        train, test = [], []
        for task in self.tasks:
            [file] = find_files(self.folder, task, "train")
            blocks = read_stories(file)
            held_out = find_files(self.folder, task, "test")
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
        """A hash of the text and the stories; of those that are simulated, of the first few."""
        stories: Any = (
            self.stories()
            if self.folder
            else [list(narrate(task, np.random.default_rng(0))) for task in self.tasks]
        )
        known = f"{super().fingerprint()} {stories!r}"
        return digest(known.encode())

    def datasets(
        self, num_samples: int, seed: int = 0, batch: int = 1, streams: int | None = None
    ) -> tuple[BabiDataset, BabiDataset]:
        """The training and the held-out data set; they share neither text nor stories, of which the
        simulated ones come from different seeds."""
        documents = split(load_text(self.source), fraction=self.held_out)
        train, test = map(Haystack.of_bytes, documents)
        learnt, asked = self.stories() if self.folder else (None, None)
        if learnt and asked:
            self.check_room(max(story.tokens for story in [*learnt, *asked]))
        else:
            self.story(np.random.default_rng(0), self.start_length or self.length)
        full_length = replace(self, start_length=None)
        return (
            BabiDataset(train, self, num_samples, seed, batch, stories=learnt),
            BabiDataset(test, full_length, num_samples, TEST_SEED + seed, batch, stories=asked),
        )


class BabiDataset(HaystackDataset):
    """Samples of stories; each takes one at random, or has its own if none are given."""

    config: BabiConfig

    def __init__(self, *args: Any, stories: Sequence[Story] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stories = stories

    def draft(
        self, rng: np.random.Generator, depth: float | None, length: int
    ) -> tuple[list[Sentence], int]:
        """The story's sentences in their order, then the question."""
        if self.stories is None:
            story = self.config.story(rng, length)
        else:
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
