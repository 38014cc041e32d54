"""Answers of a model, kept in a file as they come, so that a run that broke off asks nothing twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Answers:
    """Answers by what was asked of which model, in a JSONL file that grows line by line.

    A last line that was only half written is cut off; any other that cannot be read raises ValueError.
    """

    def __init__(self, path: str | Path, fingerprint: str) -> None:
        if not fingerprint:
            raise ValueError(
                f"answers can be kept in {path} only of a model that is told from others: give its "
                "ModelInfo a fingerprint"
            )
        self.path = Path(path)
        self.fingerprint = fingerprint
        self._known: dict[str, Any] = {}
        if self.path.is_file():
            self._load()
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, kind: str, asked: Sequence[Any]) -> Any:
        """The answer, or None."""
        return self._known.get(self._key(kind, asked))

    def add(self, kind: str, asked: Sequence[Any], answer: Any) -> None:
        """Keep an answer: it is in the file when this returns."""
        key = self._key(kind, asked)
        self._known[key] = answer
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "answer": answer}) + "\n")

    def _load(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                each = json.loads(line)
                self._known[each["key"]] = each["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {self.path} is no answer of a model: name another file"
                ) from error

    def _key(self, kind: str, asked: Sequence[Any]) -> str:
        text = json.dumps([self.fingerprint, kind, *asked], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
