"""Results as a table, as JSON, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from everlong.pictures import COLOURS, new_figure, save_figure
from everlong.provenance import provenance

from .needle import NeedleScore, Share

MARKERS = "os^Dv*"
TITLES = {
    "needle": "A pass key hidden in real text",
    "babi": "Stories of bAbI scattered in real text",
}
# Labels of lines that end together are moved apart by this share of the picture's height.
LABEL_GAP = 0.06


@dataclass(frozen=True)
class NeedleReport:
    """A model's scores. Reports of one name and several seeds are drawn as one line.

    training_length: tokens of the longest training sample. about: other facts, such as the cost.
    """

    name: str
    scores: list[NeedleScore]
    seed: int | None = None
    training_length: int | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "name": self.name,
            "seed": self.seed,
            "training_length": self.training_length,
            "about": self.about,
            "scores": [score.to_json() for score in self.scores],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NeedleReport:
        """The report that `to_json` wrote."""
        scores = [NeedleScore.from_json(score) for score in values["scores"]]
        return cls(**{**values, "scores": scores})


def length_name(length: int) -> str:
    """512 -> "512", 2048 -> "2K"."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)


def needle_table(reports: Sequence[NeedleReport]) -> list[list[str]]:
    """A head row, then a row for each length: in a column for each model the whole answers
    right in percent, with the 95% interval, and their single tokens right. Of several seeds: the mean,
    with the lowest and the highest."""
    groups = _by_name(reports)
    names = [
        name if len(group) == 1 else f"{name}, {len(group)} seeds" for name, group in groups.items()
    ]
    rows = [["tokens", *names]]
    for length in _lengths(reports):
        cells = [_cell(_at(group, length)) for group in groups.values()]
        rows.append([length_name(length), *cells])
    return rows


def print_needle_table(reports: Sequence[NeedleReport], console: Console | None = None) -> None:
    """Print `needle_table`, and what each model whose attention has a reach found beyond it."""
    console = console or Console()
    head, *rows = needle_table(reports)
    table = Table(title="whole answers right, % (95% interval) · their tokens right, %", min_width=60)
    for name in head:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, group in _by_name(reports).items():
        scores = [score for report in group for score in report.scores]
        near = [score.within_reach for score in scores if score.within_reach]
        far = [score.beyond_reach for score in scores if score.beyond_reach]
        if far:
            console.print(
                f"{name}: {_total(near)} answers right within its attention's reach, "
                f"{_total(far)} beyond it",
                highlight=False,
                soft_wrap=True,
            )


def write_results(
    path: Path, reports: Sequence[NeedleReport], task: str = "needle", **more: Any
) -> None:
    """The reports as JSON, with versions, machine and date; `more` is added at the top."""
    values = {
        "task": task,
        **more,
        "provenance": provenance(),
        "models": [report.to_json() for report in reports],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_markdown(path: Path, reports: Sequence[NeedleReport]) -> None:
    """`needle_table` as a Markdown table."""
    head, *rows = needle_table(reports)
    lines = [head, ["---:"] * len(head), *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def plot_needle(path: Path, reports: Sequence[NeedleReport], task: str = "needle") -> None:
    """Whole answers right against length, a line for each model, with its 95% interval; for several
    seeds of a model the mean with the lowest and the highest. A dashed line marks the training
    length."""
    figure, axes = new_figure()
    _draw_axes(axes, _lengths(reports))
    axes.set_title(TITLES[task], loc="left")
    _draw_lines(axes, reports)
    for length in {report.training_length for report in reports if report.training_length}:
        axes.axvline(length, color="0.35", linestyle="--", linewidth=1)
        axes.annotate(
            "training length",
            (length, 50),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="center",
            color="0.35",
        )
    save_figure(figure, path)


def _draw_axes(axes: Any, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)
    axes.set_ylim(-4, 104)
    axes.set_xticks(lengths, [length_name(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("length of the text (tokens)")
    axes.set_ylabel("whole answers right (%)")


def _draw_lines(axes: Any, reports: Sequence[NeedleReport]) -> None:
    """A line and a band for each model, and its name where the line ends."""
    ends = []
    for i, (name, group) in enumerate(_by_name(reports).items()):
        colour = COLOURS[i % len(COLOURS)]
        lengths = _lengths(group)
        spans = [_span(_at(group, length)) for length in lengths]
        low, middle, high = ([100 * span[k] for span in spans] for k in range(3))
        axes.fill_between(lengths, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(lengths, middle, color=colour, marker=MARKERS[i % len(MARKERS)], linewidth=2)
        ends.append((middle[-1], lengths[-1], name, colour))
    ends.sort()
    for (_, length, name, colour), height in zip(ends, _label_heights(ends), strict=True):
        axes.annotate(
            name,
            (length, height),
            xytext=(10, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def _label_heights(ends: list[tuple[float, int, str, str]]) -> list[float]:
    """Heights for the names at the lines' ends, lowest first, none nearer than LABEL_GAP."""
    heights: list[float] = []
    for middle, *_ in ends:
        lowest = heights[-1] + 100 * LABEL_GAP if heights else middle
        heights.append(max(middle, lowest))
    return heights


def _lengths(reports: Sequence[NeedleReport]) -> list[int]:
    return sorted({score.length for report in reports for score in report.scores})


def _by_name(reports: Sequence[NeedleReport]) -> dict[str, list[NeedleReport]]:
    groups: dict[str, list[NeedleReport]] = {}
    for report in reports:
        groups.setdefault(report.name, []).append(report)
    return groups


def _at(group: list[NeedleReport], length: int) -> list[NeedleScore]:
    return [score for report in group for score in report.scores if score.length == length]


def _span(scores: list[NeedleScore]) -> tuple[float, float, float]:
    """Low, middle, high: of the interval of one score, or over the scores of several seeds."""
    values = [score.exact.value for score in scores]
    if len(values) == 1:
        low, high = scores[0].exact.interval()
        return low, values[0], high
    return min(values), sum(values) / len(values), max(values)


def _cell(scores: list[NeedleScore]) -> str:
    if not scores:
        return "-"
    low, middle, high = _span(scores)
    digits = sum(score.digits.value for score in scores) / len(scores)
    return f"{100 * middle:.0f} ({100 * low:.0f}-{100 * high:.0f}) · {100 * digits:.0f}"


def _total(shares: list[Share]) -> str:
    hits, samples = sum(each.hits for each in shares), sum(each.samples for each in shares)
    return f"{hits:,} of {samples:,}"
