"""Scored samples on disk, a line of JSON each, so that an evaluation goes on where it was stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .task import Record


class Samples:
    """The scored samples of one model, task and length.

    Each process appends to a file of its own, NAME.RANK.jsonl, and reads those of all. A line that was
    being written when a run was killed is dropped, and its sample is asked again.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0) -> None:
        self.folder, self.name = folder, name
        self.path = folder / f"{name}.{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> dict[int, Record]:
        """The samples that are there, by index."""
        found: dict[int, Record] = {}
        for path in sorted(self.folder.glob(f"{glob_escape(self.name)}.*.jsonl")):
            for record in read_lines(path):
                if isinstance(record, dict) and isinstance(record.get("index"), int):
                    found[record["index"]] = record
        return dict(sorted(found.items()))

    def append(self, record: Record) -> None:
        """Write one more, to the disk at once."""
        append_line(self.path, record)


def append_line(path: Path, value: Any) -> None:
    """Append a line of JSON; half a line that a killed run left is cut off first."""
    with path.open("ab+") as file:
        end = file.seek(0, 2)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, 2)
        file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")


def read_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines; what is no whole line is left out."""
    if not path.is_file():
        return []
    values = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def glob_escape(name: str) -> str:
    """A name as a pattern that stands for itself."""
    return re.sub(r"([*?[])", r"[\1]", name)
