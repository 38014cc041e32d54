"""Run folders read back: a list of them, what tells them apart, a picture of their losses."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from everlong import strict_yaml
from everlong.files import read_lines
from everlong.pictures import LINE, log_if_wide, look, new_figure, save_figure, short_name
from everlong.provenance import RECIPE_FILE, RESULT_FILE, model_name
from everlong.words import is_number, one_line, shown

from .changes import flat_fields
from .progress import LOSSES, METRICS_FILE, is_loss, read_metrics

SHOWN = ("step", "steps", "parameters", "tokens", "tokens_per_second")
PICTURE_FILE = "loss.png"
SMOOTHED = 25  # about so many points of the drawn line stand for a run


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    faults: list[str] = field(default_factory=list, compare=False)
    """What could not be read, as far as it was asked for: those parts count as not there."""

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Its recipe, as it stands in the file."""
        return self._read(RECIPE_FILE)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Its log."""
        file, whole = self.folder / METRICS_FILE, read_metrics(self.folder)
        if left_out := len(read_lines(file)) - len(whole):
            self.faults.append(f"{file}: {left_out} lines are no log")
        return whole

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
            values = strict_yaml.load_file(file)  # which JSON is too
        except (OSError, ValueError) as error:
            self.faults.append(f"{file} is damaged: {one_line(error)}")
            return {}
        if not isinstance(values, dict):
            if values is not None:
                self.faults.append(f"{file} is damaged: it holds no fields")
            return {}
        wrong = _no_numbers(values) if name == RESULT_FILE else {}
        self.faults.extend(f"{file} is damaged: {each} is {value!r}" for each, value in wrong.items())
        return {each: value for each, value in values.items() if each not in wrong}

    def last(self, name: str) -> Any:
        """The last value of a name in the log; None if there is none."""
        return next((line[name] for line in reversed(self.metrics) if name in line), None)

    @property
    def model(self) -> str:
        """What kind of model it trains."""
        return model_name(self.recipe) or "?"

    @property
    def steps(self) -> str:
        """How far it is, and how far it is to go."""
        wanted = self.part("training").get("max_steps")
        if "steps" in self.result:
            return f"{self.result['steps']:,}"
        return f"{self.last('step') or 0:,}/{wanted:,}" if wanted and type(wanted) is int else "?"


def _no_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """What is no number of that which is shown as one; a loss may be NaN."""
    return {
        name: value
        for name, value in values.items()
        if (name in SHOWN and not is_number(value)) or (name in LOSSES and not is_loss(value))
    }


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
        table.add_row(
            shown(run.folder),
            shown(run.model),
            _size(run.result.get("parameters")),
            run.steps,
            _size(run.last("tokens")),
            _number(run.last("loss")),
            _number(run.last("eval_loss")),
            _size(run.result.get("tokens_per_second") or run.last("tokens_per_second")),
        )
    console = console or Console()
    console.print(table)
    for run in runs:
        for fault in run.faults:
            console.print(shown(fault, "yellow"), soft_wrap=True)


def print_differences(runs: Sequence[Run], console: Console | None = None) -> None:
    """The fields of the recipes that are not the same in all runs: each value and whose it is, so that
    any number of runs fits a terminal."""
    console = console or Console()
    shared = os.path.commonpath([run.folder.parent for run in runs])
    fields = [flat_fields(run.recipe) for run in runs]
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    for name in dict.fromkeys(name for each in fields for name in each):
        values = [each.get(name, "-") for each in fields]
        folders: dict[str, list[str]] = {}
        for told, run in zip(_told(values), runs, strict=True):
            folders.setdefault(told, []).append(os.path.relpath(run.folder, shared))
        if len(folders) > 1 and name not in ("name", "output_dir"):
            table.add_row(shown(name, "bold"), "")
            for told, whose in folders.items():
                table.add_row(shown(f"  {told}"), shown(", ".join(whose)))
    console.print(table if table.row_count else "the recipes are the same")


def plot_losses(path: Path, runs: Sequence[Run]) -> bool:
    """The training loss of each run against its steps, smoothed over the faint line that was logged,
    and the held-out loss as dots. Draws nothing, and returns False, where no run has logged a loss."""
    runs = [run for run in runs if any("loss" in line for line in run.metrics)]
    if not runs:
        return False
    figure, axes = new_figure(height=max(4.5, 1 + 1.4 * LINE * len(runs)))
    runs.sort(key=lambda run: -run.last("loss"))  # as the lines end, from top to bottom
    kinds = Counter(run.model for run in runs)
    drawn: list[float] = []
    for i, run in enumerate(runs):
        steps, losses = _values(run, "loss")
        style = look(i) | {"marker": "" if len(losses) > 1 else "s"}
        axes.plot(steps, losses, color=style["color"], alpha=0.25, linewidth=1)
        name = run.model if kinds[run.model] == 1 else f"{run.model}, {run.folder}"
        axes.plot(steps, _smooth(losses), **style, linewidth=2, label=short_name(name))
        held_out = _values(run, "eval_loss")
        axes.plot(*held_out, "o", color=style["color"], markeredgecolor="white")
        drawn += [*losses, *held_out[1]]
    log_if_wide(axes, drawn)
    axes.locator_params(axis="x", integer=True, nbins=5)
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


def _told(values: Sequence[Any]) -> list[str]:
    """Values of a recipe in as many digits as a person writes, or in all of them where two would be
    alike."""
    exact = [str(value) for value in values]
    short = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]
    return short if len(set(short)) == len(set(exact)) else exact


def _size(value: float | None) -> str:
    """1234567 -> "1.23M"."""
    if value is None:
        return ""
    exponent = min(max(int(math.log10(max(value, 1))) // 3, 0), 3)
    return f"{value / 1000**exponent:.3g}{' KMG'[exponent].strip()}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
