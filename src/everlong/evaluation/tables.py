"""Results as tables, built once, to be written as Markdown, as HTML or to a terminal.

Models are rows. Seeds of one label are one row: their mean, with the lowest and the highest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from everlong.words import file_name

from .results import Cell, Estimate, Metric, ModelInfo, Results, TaskInfo
from .run import length_name

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MISSING = "-"
MANY_SAMPLES = 1000  # from so many on a percentage has a decimal
MANY_GROUPS = 12  # from so many on groups are rows, or no page is wide enough


@dataclass
class Table:
    """A caption, a head row, rows in blocks (a block's name is "" where there is one alone), sentences
    below. So many first columns (left) hold words, the others numbers."""

    caption: str
    head: list[str]
    blocks: list[tuple[str, list[list[str]]]]
    notes: list[str] = field(default_factory=list)
    left: int = 1

    def markdown(self) -> str:
        """As a Markdown table; a block's name is a row of its own."""
        ruler = ["---"] * self.left + ["---:"] * (len(self.head) - self.left)
        lines = [list(map(for_markdown, self.head)), ruler]
        for name, rows in self.blocks:
            if name:
                lines.append([f"**{for_markdown(name)}**", *[""] * (len(self.head) - 1)])
            lines += [list(map(for_markdown, row)) for row in rows]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        notes = "".join(f"\n{for_markdown(note)}\n" for note in self.notes)
        return f"{for_markdown(self.caption)}:\n\n{text}{notes}"

    def rich(self) -> RichTable:
        """For a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.caption), title_justify="left", box=SIMPLE_HEAD, pad_edge=False
        )
        for i, name in enumerate(self.head):
            justify: Literal["left", "right"] = "left" if i < self.left else "right"
            table.add_column(Text(name), justify=justify, overflow="fold")
        for name, rows in self.blocks:
            if name:
                table.add_section()
                table.add_row(Text(name, "bold"))
            for row in rows:
                table.add_row(*map(Text, row))
        return table


@dataclass(frozen=True)
class Column:
    """One number of each model. found: by the model's name, none of them NaN. kind: "brief" is shown
    without its interval, "mean" is of other columns."""

    head: str
    metric: Metric
    found: dict[str, Estimate]
    kind: Literal["full", "brief", "mean"] = "full"

    def of(self, models: Iterable[ModelInfo]) -> list[Estimate]:
        """What is there of these models."""
        return [self.found[model.name] for model in models if model.name in self.found]


@dataclass
class Chapter:
    """Tasks that reports show together: one by itself, those of a family, or those without lengths.

    tables: of all of them; each task has its own as well.
    """

    name: str
    title: str
    tasks: list[TaskInfo]
    tables: list[Table]
    is_family: bool = False


def chapters(results: Results) -> list[Chapter]:
    """What a report consists of, in the order of the tasks."""
    found: dict[str, Chapter] = {}
    for task in results.tasks:
        if task.family:
            same = family_of(results, task.family)
            tables = [family_table(results, task.family)]
            found.setdefault(task.family, Chapter(task.family, task.family, same, tables, True))
        elif task.axis is None:
            same = plain_tasks(results)
            if len(same) > 1:
                table = _table(results, "the main number of each task", [("", plain_columns(results))])
                found.setdefault("", Chapter("", "Tasks without lengths", same, [table]))
            else:
                found[task.name] = Chapter(task.name, task.title, [task], [])
        else:
            found[task.name] = Chapter(task.name, task.title, [task], [])
    return list(found.values())


def family_of(results: Results, family: str) -> list[TaskInfo]:
    """The tasks of a family."""
    return [task for task in results.tasks if task.family == family]


def plain_tasks(results: Results) -> list[TaskInfo]:
    """The tasks that have neither a family nor an axis."""
    return [task for task in results.tasks if task.axis is None and not task.family]


def task_tables(results: Results, task: TaskInfo) -> list[Table]:
    """The tables of one task: by length or position, of each of its metrics, and by group."""
    tables = []
    if task.axis == "length":
        for name, metric in task.metrics.items():
            columns = length_columns(results, task, name)
            tables.append(_table(results, title_of(metric), [("", columns)]))
        tables[0].notes += reach_notes(results, task)
    elif task.axis == "position":
        title = f"{title_of(task.metrics[task.main])}, by position"
        for length in lengths_of(results, [task]):
            blocks = [(length_title(length), position_columns(results, task, length))]
            tables.append(_table(results, title, blocks))
    elif len(task.metrics) > 1 or len(plain_tasks(results)) == 1 or task.family:
        columns = [
            _column(results, title_of(metric), task, name) for name, metric in task.metrics.items()
        ]
        tables.append(_table(results, "all samples", [("", columns)]))
    blocks = [
        (length_title(length), columns)
        for length in lengths_of(results, [task])
        if (columns := group_columns(results, task, length))
    ]
    if blocks:
        title = f"{title_of(task.metrics[task.main])}, by group"
        table = _table(results, title, blocks)
        tables.append(turned(table) if len(table.head) > MANY_GROUPS else table)
    return [table for table in tables if table.blocks]


def family_table(results: Results, family: str) -> Table:
    """Blocks by length: the models as rows, the family's tasks as columns, and their mean."""
    tasks = family_of(results, family)
    blocks = [
        (length_title(length), family_columns(results, tasks, length))
        for length in lengths_of(results, tasks)
    ]
    metrics = [replace(task.metrics[task.main], chance=None) for task in tasks]
    titles = dict.fromkeys(title_of(metric) for metric in metrics)
    table = _table(results, "; ".join(titles), blocks)
    chances = [
        f"{column.head} {_chance(column.metric)}"
        for column in (blocks[0][1] if blocks else [])
        if column.metric.chance is not None
    ]
    if chances:
        table.notes.append(f"Guessing gives: {', '.join(chances)}.")
    return table


def family_columns(results: Results, tasks: Sequence[TaskInfo], length: int | None) -> list[Column]:
    """A column for each task and, where they measure the same, one for the mean of all of them."""
    columns = []
    for task in tasks:
        head = task.name.removeprefix(task.family or "").lstrip("_-:. ") or task.name
        columns.append(replace(_column(results, head, task, task.main, length), kind="brief"))
    metrics = [column.metric for column in columns]
    if len({(metric.title, metric.is_share) for metric in metrics}) == 1 and len(columns) > 1:
        found = {
            model.name: _mean([column.found[model.name] for column in columns])
            for model in results.models
            if all(model.name in column.found for column in columns)
        }
        chances = [metric.chance for metric in metrics if metric.chance is not None]
        chance = sum(chances) / len(chances) if len(chances) == len(metrics) else None
        columns.append(Column("mean", replace(metrics[0], chance=chance), found, "mean"))
    return columns


def length_columns(results: Results, task: TaskInfo, metric: str) -> list[Column]:
    """A column for each length."""
    return [
        _column(results, length_name(length), task, metric, length)
        for length in results.lengths([task.name])
    ]


def group_columns(results: Results, task: TaskInfo, length: int | None) -> list[Column]:
    """A column for each group of a task's samples."""
    groups = dict.fromkeys(
        cell.group
        for cell in results.cells
        if cell.task == task.name and cell.length == length and cell.group is not None
    )
    return [_column(results, group, task, task.main, length, group) for group in groups]


def plain_columns(results: Results) -> list[Column]:
    """A column for each task that has neither a family nor an axis."""
    return [
        _column(results, f"{task.title}: {title_of(task.metrics[task.main])}", task, task.main)
        for task in plain_tasks(results)
    ]


def position_columns(results: Results, task: TaskInfo, length: int | None) -> list[Column]:
    """A column for each range of positions, and one for all of them."""
    metric = task.metrics[task.main]
    ranges: dict[tuple[int, int], dict[str, Estimate]] = {}
    for cell in cells_at(results, task.name, length):
        for point in cell.curve:
            if math.isfinite(point.estimate.value):
                ranges.setdefault((point.start, point.end), {})[cell.model] = point.estimate
    columns = [
        Column(f"{length_name(start) if start else '0'}-{length_name(end)}", metric, ranges[start, end])
        for start, end in sorted(ranges)
    ]
    return [*columns, _column(results, "all", task, task.main, length)]


def cells_at(results: Results, task: str, length: int | None, group: str | None = None) -> list[Cell]:
    """The cells of a task and group at just that length, None among them."""
    return [cell for cell in results.find(task, group=group) if cell.length == length]


def lengths_of(results: Results, tasks: Iterable[TaskInfo]) -> list[int | None]:
    """The lengths of these tasks' cells, first None if one has none."""
    names = {task.name for task in tasks}
    found = {cell.length for cell in results.cells if cell.task in names}
    return sorted(found, key=lambda length: -1 if length is None else length)


def rows_of(results: Results) -> dict[str, list[ModelInfo]]:
    """What is one row of a table and one line of a picture, by its name: the seeds of a label. Models
    of one label that are no seeds of each other stand alone."""
    labels: dict[str, list[ModelInfo]] = {}
    for model in results.models:
        labels.setdefault(model.label, []).append(model)
    rows: dict[str, list[ModelInfo]] = {}
    for label, models in labels.items():
        if len({model.seed for model in models}) == len(models):
            rows[label] = models
        else:
            rows.update({model.name: [model] for model in models})
    return rows


def span(estimates: Sequence[Estimate]) -> tuple[float, float, float]:
    """Low, middle, high: of the interval of one, of the values of several; NaN of nothing."""
    if not estimates:
        return math.nan, math.nan, math.nan
    if len(estimates) == 1:
        return estimates[0].low, estimates[0].value, estimates[0].high
    values = [each.value for each in estimates]
    return min(values), sum(values) / len(values), max(values)


def models_table(results: Results) -> Table:
    """What was evaluated."""
    head = ["model", "kind", "parameters", "seed", "trained at", "takes at most", "fingerprint"]
    rows = [
        [
            model.name,
            model.kind,
            f"{model.parameters:,}",
            MISSING if model.seed is None else str(model.seed),
            length_title(model.training_length) or MISSING,
            length_title(model.longest) or "any length",
            model.fingerprint[:12] or MISSING,
        ]
        for model in results.models
    ]
    return Table("what was evaluated", head, [("", rows)], left=2)


def facts_table(results: Results) -> list[Table]:
    """Where the models are and what else is known of them, such as what their training cost."""
    names = dict.fromkeys(
        name
        for model in results.models
        for name, value in model.about.items()
        if isinstance(value, (int, float, str)) and not hasattr(model, name)
    )
    rows = [
        [model.name, model.path, *(_fact(model.about.get(name)) for name in names)]
        for model in results.models
    ]
    head = ["model", "folder", *(name.replace("_", " ") for name in names)]
    return [Table("what else is known of them", head, [("", rows)], left=2)] if rows else []


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return number(value, Metric("", is_share=False))
    return MISSING if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def reach_notes(results: Results, task: TaskInfo) -> list[str]:
    """What each model whose attention has a reach found within it, and beyond it."""
    notes = []
    for name, models in rows_of(results).items():
        cells = [cell for model in models for cell in results.find(task.name, model.name)]
        near = _total(cell.more.get("within_reach") for cell in cells)
        far = _total(cell.more.get("beyond_reach") for cell in cells)
        if near[1] and far[1]:
            notes.append(
                f"{name} finds {_of(*near)} answers within its attention's reach "
                f"and {_of(*far)} beyond."
            )
    return notes


def length_title(length: int | None) -> str:
    """ "2K tokens"; "" of None."""
    return "" if length is None else f"{length_name(length)} tokens"


def title_of(metric: Metric) -> str:
    """ "whole answers right, % (chance 17%)"."""
    title = f"{metric.title}, %" if metric.is_share else metric.title
    facts = [] if metric.higher_is_better else ["lower is better"]
    if metric.chance is not None:
        facts.append(f"chance {_chance(metric)}")
    return f"{title} ({', '.join(facts)})" if facts else title


def _chance(metric: Metric) -> str:
    assert metric.chance is not None
    return number(metric.chance, metric) + "%" * metric.is_share


def number(value: float, metric: Metric, samples: int = 0) -> str:
    """A share in percent; another number with four digits; "-" for what is no number."""
    if not math.isfinite(value):
        return MISSING
    if metric.is_share:
        return f"{100 * value:.{int(samples >= MANY_SAMPLES)}f}"
    # 0 is added to make 0 of -0.
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value + 0:#.4g}"


def anchor(name: str) -> str:
    """A name as a file, or a place of a page, may be called."""
    return file_name(name)


def _column(
    results: Results,
    head: str,
    task: TaskInfo,
    metric: str,
    length: int | None = None,
    group: str | None = None,
) -> Column:
    found = {
        cell.model: cell.metrics[metric]
        for cell in cells_at(results, task.name, length, group)
        if metric in cell.metrics and math.isfinite(cell.metrics[metric].value)
    }
    return Column(head, task.metrics[metric], found)


def _table(results: Results, caption: str, blocks: Sequence[tuple[str, list[Column]]]) -> Table:
    """The columns of a block, side by side; the same heads in all blocks. Empty rows are left out."""
    blocks = [(name, columns) for name, columns in blocks if any(each.found for each in columns)]
    heads = [column.head for column in blocks[0][1]] if blocks else []
    counts = [
        {estimate.samples for each in same if each.kind != "mean" for estimate in each.found.values()}
        for same in zip(*(columns for _, columns in blocks), strict=True)
    ]
    if len(set().union(*counts)) > 1:
        heads = [
            f"{head}, n {_from_to(count)}" if count else head
            for head, count in zip(heads, counts, strict=True)
        ]
    rows: list[tuple[str, list[list[str]]]] = []
    shown: dict[str, int] = {}
    for name, columns in blocks:
        rows.append((name, []))
        for row, models in rows_of(results).items():
            if any(column.of(models) for column in columns):
                shown[row] = len(models)
                row_name = row if len(models) == 1 else f"{row}, {len(models)} seeds"
                rows[-1][1].append([row_name, *(_cell(column, models) for column in columns)])
    columns = [column for _, each in blocks for column in each]
    facts = _facts(columns, set(shown.values()), set().union(*counts))
    return Table(" · ".join([caption, *facts]), ["model", *heads], rows)


def _facts(columns: Sequence[Column], seeds: set[int], counts: set[int]) -> list[str]:
    """What a reader must know of the cells: their intervals, the seeds, the samples."""
    full = [each for column in columns if column.kind != "brief" for each in column.found.values()]
    facts = []
    if 1 in seeds and any(math.isfinite(each.high) for each in full):
        facts.append("in brackets the 95% interval")
    if seeds - {1}:
        facts.append("of several seeds the mean" + (" (lowest-highest)" if full else ""))
    if len(counts) == 1:
        count = counts.pop()
        facts.append(f"{count:,} sample{'s' if count > 1 else ''} each")
    return facts


def _cell(column: Column, models: Sequence[ModelInfo]) -> str:
    estimates = column.of(models)
    if not estimates:
        return MISSING
    low, middle, high = span(estimates)
    samples = max(each.samples for each in estimates)
    text = number(middle, column.metric, samples)
    if column.kind != "brief" and math.isfinite(low) and math.isfinite(high):
        if column.metric.is_share:
            low, high = max(low, 0.0), min(high, 1.0)
        ends = (number(each, column.metric, samples) for each in (low, high))
        text += f" ({('-' if low >= 0 else ' to ').join(ends)})"
    if len(estimates) < len(models):
        text += f", {len(estimates)} seed{'s' if len(estimates) > 1 else ''}"
    return text


def chosen(table: Table, columns: Sequence[int]) -> Table:
    """The table with its left columns and these."""
    places = [*range(table.left), *columns]
    blocks = [(name, [[row[i] for i in places] for row in rows]) for name, rows in table.blocks]
    return replace(table, head=[table.head[i] for i in places], blocks=blocks)


def turned(table: Table) -> Table:
    """The table with columns as rows, in each block; one whose left columns are several stays."""
    if table.left > 1:
        return table
    models = list(dict.fromkeys(row[0] for _, rows in table.blocks for row in rows))
    blocks = []
    for name, rows in table.blocks:
        cells = {row[0]: row[1:] for row in rows}
        swapped = [
            [head, *(cells[model][i] if model in cells else MISSING for model in models)]
            for i, head in enumerate(table.head[1:])
        ]
        blocks.append((name, swapped))
    return replace(table, head=["", *models], blocks=blocks)


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates: their distances to their ends add up in squares."""
    n = len(estimates)
    middle = sum(each.value for each in estimates) / n
    below = math.sqrt(sum((each.value - each.low) ** 2 for each in estimates)) / n
    above = math.sqrt(sum((each.high - each.value) ** 2 for each in estimates)) / n
    return Estimate(middle, middle - below, middle + above, sum(each.samples for each in estimates))


def _total(parts: Iterable[dict[str, Any] | None]) -> tuple[int, int]:
    """Hits and samples of estimates as JSON has them, where they are there."""
    there = [each for each in parts if each and each["samples"]]
    return (
        sum(round(each["value"] * each["samples"]) for each in there),
        sum(each["samples"] for each in there),
    )


def _of(hits: int, samples: int) -> str:
    """ "12 of the 36"."""
    return f"{f'{hits:,}' if hits else 'none'} of the {samples:,}"


def _from_to(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def for_markdown(text: str) -> str:
    """A text that means nothing in Markdown: no link, tag, formula or end of a cell."""
    return re.sub(r"[\\`*\[\]<>|$&~]", r"\\\g<0>", " ".join(text.split()))
