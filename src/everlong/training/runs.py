"""Run folders read back: a list of them, what tells them apart, a picture of their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from everlong.pictures import COLOURS, new_figure, save_figure
from everlong.provenance import RECIPE_FILE, RESULT_FILE
from everlong.words import one_line

from .changes import flat_fields
from .progress import read_metrics

PICTURE_FILE = "loss.png"
STYLES = ("-", "--", ":")
SMOOTHED = 25  # about so many points of the drawn line stand for a run


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Its recipe, as it stands in the file."""
        return self._read(RECIPE_FILE)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Its log."""
        return read_metrics(self.folder)

    @cached_property
    def result(self) -> dict[str, Any]:
        """What it came to; empty if it has not ended."""
        return self._read(RESULT_FILE) if (self.folder / RESULT_FILE).is_file() else {}

    def part(self, name: str) -> dict[str, Any]:
        """A part of its recipe; empty where it holds no fields."""
        found = self.recipe.get(name)
        return found if isinstance(found, dict) else {}

    def _read(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))  # which JSON is too
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged: {one_line(error)}") from error
        return values if isinstance(values, dict) else {}

    def last(self, name: str) -> Any:
        """The last value of a name in the log; None if there is none."""
        return next((line[name] for line in reversed(self.metrics) if name in line), None)

    @property
    def steps(self) -> str:
        """How far it is, and how far it is to go."""
        wanted = self.part("training").get("max_steps")
        if "steps" in self.result:
            return f"{self.result['steps']:,}"
        return f"{self.last('step') or 0:,}/{wanted:,}" if wanted else "?"


def find_runs(places: Sequence[str | Path]) -> list[Run]:
    """The runs that folders are, or hold at any depth, each once, in the order of their paths.

    Raises ValueError for a place without a run.
    """
    found: dict[Path, Run] = {}
    for place in places:
        files = sorted(Path(place).rglob(RECIPE_FILE))
        if not files:
            raise ValueError(f"{place} holds no run: name run folders, or a folder with such in it")
        found |= {file.parent.resolve(): Run(file.parent) for file in files}
    return list(found.values())


def print_runs(runs: Sequence[Run], console: Console | None = None) -> None:
    """A table of runs, a line each."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("model", overflow="fold", min_width=7)
    for name in ("size", "steps", "tokens", "loss", "held out", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        model = run.part("model")
        table.add_row(
            str(run.folder),
            str(model.get("preset") or model.get("type") or model.get("path")),
            _size(run.result.get("parameters")),
            run.steps,
            _size(run.last("tokens")),
            _number(run.last("loss")),
            _number(run.last("eval_loss")),
            _size(run.result.get("tokens_per_second") or run.last("tokens_per_second")),
        )
    (console or Console()).print(table)


def print_differences(runs: Sequence[Run], console: Console | None = None) -> None:
    """The fields of the recipes that are not the same in all runs."""
    fields = [flat_fields(run.recipe) for run in runs]
    names = dict.fromkeys(name for each in fields for name in each)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("field", *(str(run.folder) for run in runs)):
        table.add_column(name, overflow="fold")
    for name in names:
        values = [str(each[name]) if name in each else "-" for each in fields]
        if len(set(values)) > 1 and name not in ("name", "output_dir"):
            table.add_row(name, *values)
    console = console or Console()
    console.print(table if table.row_count else "the recipes are the same")


def plot_losses(path: Path, runs: Sequence[Run]) -> bool:
    """The training loss of each run against its steps, smoothed over the faint line that was logged,
    and the held-out loss as dots. Draws nothing, and returns False, where no run has logged a loss."""
    runs = [run for run in runs if any("loss" in line for line in run.metrics)]
    if not runs:
        return False
    figure, axes = new_figure()
    runs.sort(key=lambda run: -run.last("loss"))  # as the lines end, from top to bottom
    for i, run in enumerate(runs):
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        steps, losses = _values(run, "loss")
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
        name = str(run.recipe.get("name") or run.folder)
        axes.plot(steps, _smooth(losses), style, color=colour, linewidth=2, label=name)
        axes.plot(*_values(run, "eval_loss"), "o", color=colour, markeredgecolor="white")
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token; dots: held out)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)
    return True


def _values(run: Run, name: str) -> tuple[list[int], list[float]]:
    """The steps at which a name was logged, and its values."""
    lines = [line for line in run.metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def _smooth(losses: list[float]) -> list[float]:
    """An exponential mean, unbiased at its start, over about 1/SMOOTHED of the run."""
    keep = 1 - 1 / max(len(losses) / SMOOTHED, 1)
    smoothed, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


def _size(value: float | None) -> str:
    """1234567 -> "1.23M"."""
    if value is None:
        return ""
    exponent = min(max(int(math.log10(max(value, 1))) // 3, 0), 3)
    return f"{value / 1000**exponent:.3g}{' KMG'[exponent].strip()}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
