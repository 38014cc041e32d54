"""The files of bAbI (Weston et al., 2015): read, written from simulated stories, and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from everlong.files import write_file

from .babi_solver import answers
from .babi_story import Story
from .babi_world import TASKS, simulate
from .haystack import TEST_SEED
from .text import read_text

NAMES = {
    "qa1": "single-supporting-fact",
    "qa2": "two-supporting-facts",
    "qa3": "three-supporting-facts",
    "qa4": "two-arg-relations",
    "qa5": "three-arg-relations",
    "qa6": "yes-no-questions",
    "qa7": "counting",
    "qa8": "lists-sets",
    "qa9": "simple-negation",
    "qa10": "indefinite-knowledge",
}


def read_stories(path: Path) -> list[list[Story]]:
    """The stories of a bAbI file: a list for each block of lines that are numbered from 1.

    Raises ValueError for a line that is not of bAbI.
    """
    blocks: list[list[Story]] = []
    numbers: list[int] = []
    facts: list[str] = []
    for line in read_text(path).decode().splitlines():
        found = re.fullmatch(r"([0-9]+) ([^\t]+?)(?: ?\t([^\t]+)\t([0-9 ]+))?", line.rstrip())
        if found is None or (not blocks and found[1] != "1"):
            raise ValueError(f"{path} is no file of bAbI: it has the line {line[:80]!r}")
        number, text, answer, supports = found.groups()
        if number == "1":
            blocks.append([])
            numbers, facts = [], []
        if answer is None:
            numbers.append(int(number))
            facts.append(text)
            continue
        if not {*map(int, supports.split())} <= {*numbers}:
            raise ValueError(f"{path} is no file of bAbI: {line[:80]!r} rests on a line that is none")
        rests_on = tuple(numbers.index(int(each)) for each in supports.split())
        blocks[-1].append(Story(tuple(facts), text.strip(), answer, rests_on))
    return blocks


def find_files(folder: str, task: str, part: str) -> list[Path]:
    """The file of a task, qa1_..._train.txt; none for a test file that is not there."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is no folder, it has none of bAbI: name the one with qa1_..._train.txt"
        )
    found = sorted(Path(folder).glob(f"{task}_*_{part}.txt"))
    if len(found) == 1 or (part == "test" and not found):
        return found
    there = sorted({path.name.split("_")[0] for path in Path(folder).glob("qa*_train.txt")})
    raise ValueError(
        f"{folder} has {len(found)} files {task}_*_{part}.txt, not one"
        f"{': it has ' + ', '.join(there) if there else ': it has none of bAbI'}"
    )


def write_babi(folder: Path, tasks: Sequence[str], questions: int, seed: int = 0) -> list[Path]:
    """Write simulated stories as bAbI's files of these tasks, and say which.

    questions: for training; the test file has a tenth of them, from another seed. A block that is
    begun is ended, so there may be up to four more.
    Raises ValueError for another task, no question, and a file that is there already.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"tasks are some of {', '.join(TASKS)}, got {', '.join(tasks)!r}")
    if questions < 1:
        raise ValueError(f"the number of stories must be at least 1, got {questions}")
    parts = (("train", questions, seed), ("test", -(-questions // 10), TEST_SEED + seed))
    paths = {
        (task, part): folder / f"{task}_{NAMES[task]}_{part}.txt"
        for task in tasks
        for part, _, _ in parts
    }
    for path in paths.values():
        if path.exists():
            raise ValueError(f"{path} is there already: name another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        for part, wanted, first in parts:
            rng = np.random.default_rng((first, TASKS.index(task)))
            lines: list[str] = []
            written = 0
            while written < wanted:
                block = simulate(task, rng)
                lines += _lines(block, task)
                written += len(block)
            write_file(paths[task, part], "\n".join(lines) + "\n")
    return list(paths.values())


def _lines(block: Sequence[Story], task: str) -> list[str]:
    """A block of stories as a file has them."""
    lines: list[str] = []
    numbers: list[int] = []
    blank = "" if task == "qa4" else " "  # before the answer
    for story in block:
        for fact in story.facts[len(numbers) :]:
            numbers.append(len(lines) + 1)
            lines.append(f"{len(lines) + 1} {fact}")
        supports = " ".join(str(numbers[i]) for i in story.supports)
        lines.append(f"{len(lines) + 1} {story.question}{blank}\t{story.answer}\t{supports}")
    return lines


def check_babi(folder: Path) -> dict[str, tuple[int, int]]:
    """For each task with files in a folder, how many questions are answered rightly, and are there.

    A solver answers them that reads the sentences alone. Where two answers are right (see `answers`)
    either counts.
    Raises ValueError for a folder without files of bAbI, and for a file of something else.
    """
    counts = {}
    for task in TASKS:
        paths = sorted(folder.glob(f"{task}_*.txt"))
        right = asked = 0
        for path in paths:
            for block in read_stories(path):
                for story in block:
                    right += story.answer in answers(task, story.facts, story.question)
                    asked += 1
        if paths:
            counts[task] = right, asked
    if not counts:
        raise ValueError(f"{folder} has no files of bAbI, such as qa1_{NAMES['qa1']}_train.txt")
    return counts
