"""Scored samples on disk, a line of JSON each, so that an evaluation goes on where it was stopped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everlong.files import append_line, read_lines

from .task import Record


class Samples:
    """The scored samples of one model, task and length.

    Each process appends to a file of its own, NAME.RANK.jsonl, and reads those of all. A line that was
    being written when a run was killed is dropped, and its sample is asked again.
    count: how many there are, all told. fault: what is wrong with a sample, "" if nothing is.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        rank: int = 0,
        *,
        count: int,
        fault: Callable[[Record], str] = lambda record: "",
    ) -> None:
        self.folder, self.name, self.count, self.fault = folder, name, count, fault
        self.path = folder / f"{name}.{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> dict[int, Record]:
        """The samples that are there, by index. Raises ValueError for a file with one at fault."""
        found: dict[int, Record] = {}
        for path in sorted(self.folder.glob(f"{glob_escape(self.name)}.*.jsonl")):
            for record in read_lines(path):
                index: Any = record.get("index") if isinstance(record, dict) else None
                if type(index) is not int or not 0 <= index < self.count:
                    fault = f"a sample has the index {index!r}, there are {self.count:,}"
                elif fault := self.fault(record):
                    fault = f"sample {index} has {fault}"
                if fault:
                    raise ValueError(
                        f"{path} is damaged: {fault}. Delete the file, and its samples are asked again"
                    )
                found[index] = record
        return dict(sorted(found.items()))

    def append(self, record: Record) -> None:
        """Write one more, to the disk at once."""
        append_line(self.path, record)


def is_samples(path: Path) -> bool:
    """Whether a file is called as `Samples` of an evaluation are: NAME-HASH.RANK.jsonl."""
    return path.is_file() and re.fullmatch(r".+-[0-9a-f]{10}\.\d+\.jsonl", path.name) is not None


def glob_escape(name: str) -> str:
    """A name as a pattern that stands for itself."""
    return re.sub(r"([*?[])", r"[\1]", name)
