"""Answers of a model, kept in a file as they come, so that a run that broke off asks nothing twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everlong.data.config import digest
from everlong.files import append_line, read_lines


class Answers:
    """Answers by what was asked of which model, in a file of JSON lines.

    fingerprint: a hash of the model. Raises ValueError without one.
    """

    def __init__(self, path: str | Path, fingerprint: str) -> None:
        if not fingerprint:
            raise ValueError(
                f"answers can be kept in {path} only of a model that is told from others: give its "
                "ModelInfo a fingerprint"
            )
        self.path = Path(path)
        self.fingerprint = fingerprint
        self._known = {
            line["key"]: line["answer"]
            for line in read_lines(self.path)
            if isinstance(line, dict) and {"key", "answer"} <= line.keys()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, kind: str, asked: Sequence[Any]) -> Any:
        """The answer, or None."""
        return self._known.get(self._key(kind, asked))

    def add(self, kind: str, asked: Sequence[Any], answer: Any) -> None:
        """Keep an answer: it is in the file when this returns."""
        key = self._key(kind, asked)
        self._known[key] = answer
        append_line(self.path, {"key": key, "answer": answer})

    def _key(self, kind: str, asked: Sequence[Any]) -> str:
        return digest(json.dumps([self.fingerprint, kind, *asked], sort_keys=True).encode())
