"""What a task of `everlong eval` is: samples, each asked and scored by itself."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from everlong.words import is_number

from .results import NUM_DEPTH_BINS, Cell, Estimate, TaskInfo
from .subject import Subject

Record = dict[str, Any]
"""A scored sample, as JSON values: index, scores ({metric: number}), tokens (read), seconds (its
share); where they are known depth (in [0, 1]) and group; and what a reader wants to see: prompt (its
end), evidence (what the text says of the answer, wherever that stands), wanted, answer."""
OPTIONAL = ("depth", "seconds", "peak_mib", "distance", "bytes")  # numbers, where they are known
AROUND = 60  # tokens or characters that are shown on either side of what answers


class Task(ABC):
    """Samples 0 ... count - 1 at each length; which sample it is depends on seed, length and index."""

    info: TaskInfo

    @property
    def has_lengths(self) -> bool:
        """Whether it is asked at each length."""
        return self.info.axis == "length"

    def check(self, subject: Subject, length: int | None) -> None:  # noqa: B027
        """Raise ValueError, before any work, if this model cannot be asked this."""

    def count(self, subject: Subject, length: int | None, samples: int) -> int:
        """How many samples there are, if so many are wanted."""
        return samples

    def cost(self, subject: Subject, length: int | None) -> int:
        """Tokens of a sample, about: what a progress bar counts by."""
        return length or 1000

    def fingerprint(self, subject: Subject, length: int | None, count: int) -> str:
        """A hash of what `count` samples are made of besides `info.settings`, such as the text: samples
        that were scored on something else are not taken for those asked for."""
        return ""

    fields: frozenset[str] = frozenset()  # of its records, besides index, scores and tokens

    def fault(self, record: Record) -> str:
        """What is wrong with a record that was read from a file; "" if nothing is."""
        missing = {"scores", "tokens", *self.fields} - record.keys()
        if missing:
            return f"no {', '.join(sorted(missing))}"
        scores = record["scores"]
        if not isinstance(scores, dict):
            return f"scores {scores!r}"
        own = "values" not in record  # a score of lm-eval's may be any number
        given: list[tuple[str, Any, bool]] = [
            (name, scores.get(name), own and metric.is_share)
            for name, metric in self.info.metrics.items()
            if own or name in scores
        ]
        for name, value, is_share in given:
            sound = is_number(value) if own else isinstance(value, (int, float))
            if not sound or (is_share and not 0 <= value <= 1):
                return f"{name} {value!r}"
        sizes = {name: record[name] for name in ("tokens", *OPTIONAL) if name in record}
        for name, value in sizes.items():
            if value is None and name in OPTIONAL:
                continue
            if not is_number(value) or value < 0 or (name == "depth" and value > 1):
                return f"{name} {value!r}"
        return ""

    @abstractmethod
    def run(
        self, subject: Subject, length: int | None, indices: Sequence[int], count: int
    ) -> Iterator[Record]:
        """Ask and score these samples of `count`, in an order that may be another."""

    def cells(self, subject: Subject, length: int | None, records: Sequence[Record]) -> list[Cell]:
        """What the scored samples come to: all of them, and each group by itself."""
        groups = sorted({record["group"] for record in records if record.get("group") is not None})
        return [
            self.cell(subject, length, records),
            *(
                self.cell(subject, length, [r for r in records if r.get("group") == group], group)
                for group in groups
            ),
        ]

    def cell(
        self,
        subject: Subject,
        length: int | None,
        records: Sequence[Record],
        group: str | None = None,
    ) -> Cell:
        """One cell of these samples."""
        metrics = {
            name: Estimate.of(
                [r["scores"][name] for r in records if name in r["scores"]], is_share=metric.is_share
            )
            for name, metric in self.info.metrics.items()
        }
        return Cell(
            task=self.info.name,
            model=subject.info.name,
            length=length,
            metrics=metrics,
            group=group,
            by_depth=_by_depth(records, self.info.main),
            tokens=sum(record["tokens"] for record in records) / max(len(records), 1),
            seconds=sum(record.get("seconds", 0.0) for record in records),
            more=_peak(records),
        )


@dataclass
class SharedTime:
    """each: seconds a sample, once the work is done."""

    each: float = 0.0


@contextmanager
def share_time(samples: int) -> Iterator[SharedTime]:
    """The time of work that is done for several samples at once, shared among them."""
    started, shared = time.perf_counter(), SharedTime()
    yield shared
    shared.each = (time.perf_counter() - started) / samples


def _peak(records: Sequence[Record]) -> dict[str, float]:
    peaks = [record["peak_mib"] for record in records if record.get("peak_mib") is not None]
    return {"peak_mib": max(peaks)} if peaks else {}


def _by_depth(records: Sequence[Record], metric: str) -> list[Estimate]:
    placed = [record for record in records if record.get("depth") is not None]
    if not placed:
        return []
    bins: list[list[float]] = [[] for _ in range(NUM_DEPTH_BINS)]
    for record in placed:
        place = min(int(record["depth"] * NUM_DEPTH_BINS), NUM_DEPTH_BINS - 1)
        bins[place].append(record["scores"][metric])
    return [Estimate.of(values) for values in bins]
