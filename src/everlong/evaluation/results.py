"""What an evaluation found, as plain values: written to results.json, read by every report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from everlong.files import write_file
from everlong.provenance import provenance
from everlong.words import plain_all

NUM_DEPTH_BINS = 10
FORMAT = 2  # of results.json
HEAD = '{\n "format": '  # how it begins
Z = 1.959963984540054  # 95%


@dataclass(frozen=True)
class Metric:
    """What a number says.

    title: in words, such as "whole answers right". is_share: in [0, 1], shown in percent.
    chance: what guessing gives, where that is known.
    """

    title: str
    is_share: bool = True
    higher_is_better: bool = True
    chance: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its 95% interval."""

    value: float
    low: float
    high: float
    samples: int

    @property
    def hits(self) -> int:
        """How many samples had it, where the value is a share."""
        return round(self.value * self.samples)

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        weights: Sequence[float] | None = None,
        *,
        is_share: bool = False,
    ) -> Estimate:
        """The (weighted) mean of the samples' values.

        Of zeros and ones with Wilson's interval, of others with one by the standard error (of a
        weighted mean: of a ratio); that of shares ends at 0 and 1. NaN of nothing, with the interval of
        no knowledge.
        """
        n = len(values)
        if not n:
            return cls(math.nan, 0.0, 1.0, 0)
        each = np.asarray(values, np.float64)
        if weights is None and set(each.tolist()) <= {0.0, 1.0}:
            return cls.of_hits(int(each.sum()), n)
        weight = np.ones(n) if weights is None else np.asarray(weights, np.float64)
        mean = float((each * weight).sum() / weight.sum())
        spread = math.sqrt(float(((weight * (each - mean)) ** 2).sum()) / max(n - 1, 1) / n)
        half = Z * spread / float(weight.mean()) if n > 1 else math.nan
        low, high = mean - half, mean + half
        if is_share:
            low, high = (0.0, 1.0) if n == 1 else (max(low, 0.0), min(high, 1.0))
        return cls(mean, low, high, n)

    @classmethod
    def of_hits(cls, hits: int, samples: int) -> Estimate:
        """A share with Wilson's score interval."""
        if not samples:
            return cls(math.nan, 0.0, 1.0, 0)
        p, n = hits / samples, samples
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + (Z / n / 2) ** 2)
        return cls(p, max(0.0, middle - half), min(1.0, middle + half), n)


@dataclass(frozen=True)
class Point:
    """A part of a curve: the estimate for positions start ... end (tokens)."""

    start: int
    end: int
    estimate: Estimate


@dataclass(frozen=True)
class Cell:
    """What one model made of one task at one length, or of one group of its samples.

    model: the name of a `ModelInfo`. length: tokens asked for, None where a task has none.
    group: such as "STEM"; None: all samples. metrics: by name; the task's first one is the main one.
    by_depth: the main metric where the answer stood in each tenth of the text, from its start to its
    end; empty where that is not known. curve: the main metric along positions.
    tokens: of a sample, on average. seconds: of all of them. more: whatever else the task tells.
    """

    task: str
    model: str
    length: int | None
    metrics: dict[str, Estimate]
    group: str | None = None
    by_depth: list[Estimate] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    tokens: float = 0.0
    seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Behind the main metric."""
        return next(iter(self.metrics.values())).samples

    @property
    def main(self) -> Estimate:
        """The main metric's."""
        return next(iter(self.metrics.values()))


@dataclass(frozen=True)
class TaskInfo:
    """A task as its readers are told of it.

    title: a line. about: a few sentences: what is asked, how it is scored. family: tasks of one
    family, such as babilong's, are also shown in one table; None: it stands alone.
    axis: what its cells differ in: "length"; "position" (one curve a cell); None (one cell, or one a
    group). settings: what its samples depend on.
    """

    name: str
    title: str
    about: str
    metrics: dict[str, Metric]
    axis: Literal["length", "position"] | None = "length"
    family: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return next(iter(self.metrics))


@dataclass(frozen=True)
class ModelInfo:
    """A model as reports name it. Several seeds of one recipe share `label`, and are drawn as one.

    name: unlike all others of the results. training_length: tokens of its longest training sample.
    longest: tokens that it takes at most, None if there is no limit. about: other facts, such as what
    its training cost. fingerprint: a hash of its weights, configuration and tokenizer.
    """

    name: str
    label: str
    path: str
    kind: str
    parameters: int
    seed: int | None = None
    training_length: int | None = None
    longest: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass
class Results:
    """Everything an evaluation found. settings: of the run, with the command that repeats it."""

    tasks: list[TaskInfo]
    models: list[ModelInfo]
    cells: list[Cell]
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=provenance)

    def find(
        self, task: str, model: str | None = None, length: int | None = None, group: str | None = None
    ) -> list[Cell]:
        """The cells of a task and of just that group; of a model, at a length, if these are given."""
        return [
            cell
            for cell in self.cells
            if cell.task == task
            and cell.group == group
            and (model is None or cell.model == model)
            and (length is None or cell.length == length)
        ]

    def plain(self) -> Results:
        """It with each text as it may be shown (`everlong.words.plain`)."""
        return Results._of(plain_all(dataclasses.asdict(self)))

    def lengths(self, tasks: Iterable[str] | None = None) -> list[int]:
        """The lengths of the cells (of these tasks), the shortest first."""
        wanted = None if tasks is None else set(tasks)
        return sorted(
            {
                cell.length
                for cell in self.cells
                if cell.length is not None and (wanted is None or cell.task in wanted)
            }
        )

    def write(self, path: Path) -> None:
        """Write results.json."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(_plain(values), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `write` wrote. Raises ValueError for another file, or half of one."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not whole ({error}): run the evaluation again") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"{path} holds no results of this version of everlong: run it again")
        return cls._of(values)

    @classmethod
    def _of(cls, values: dict[str, Any]) -> Results:
        tasks = [_task(each) for each in values["tasks"]]
        models = [ModelInfo(**each) for each in values["models"]]
        cells = [_cell(each) for each in values["cells"]]
        return cls(**{**values, "tasks": tasks, "models": models, "cells": cells})


def is_results(path: Path) -> bool:
    """Whether a file was written by `Results.write`, of this version or another. Raises ValueError if
    it was, and is cut short or damaged."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text[: len(HEAD)] in HEAD:
            raise ValueError(f"{path} is damaged or cut short") from error
        return False
    return isinstance(values, dict) and {"format", "tasks", "models", "cells"} <= values.keys()


def _plain(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _estimate(values: dict[str, Any]) -> Estimate:
    numbers: dict[str, Any] = {
        name: math.nan if each is None else each for name, each in values.items()
    }
    return Estimate(**numbers)


def _cell(values: dict[str, Any]) -> Cell:
    metrics = {name: _estimate(each) for name, each in values["metrics"].items()}
    by_depth = [_estimate(each) for each in values["by_depth"]]
    curve = [Point(**{**each, "estimate": _estimate(each["estimate"])}) for each in values["curve"]]
    return Cell(**{**values, "metrics": metrics, "by_depth": by_depth, "curve": curve})


def _task(values: dict[str, Any]) -> TaskInfo:
    metrics = {name: Metric(**each) for name, each in values["metrics"].items()}
    return TaskInfo(**{**values, "metrics": metrics})
