"""Results as pictures: curves against length and position, heat maps, bars."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from everlong.files import write_file
from everlong.pictures import (
    HEAT,
    LETTER,
    LINE,
    NUMBER,
    PAPER,
    log_if_wide,
    look,
    name_lines,
    name_ticks,
    new_figure,
    new_panels,
    save_figure,
    short_name,
    svg_of,
    wrapped,
)

from .results import NUM_DEPTH_BINS, Cell, Estimate, Metric, ModelInfo, Results, TaskInfo
from .run import length_name
from .tables import (
    MANY_GROUPS,
    Column,
    anchor,
    chapters,
    family_columns,
    family_of,
    group_columns,
    length_columns,
    length_title,
    lengths_of,
    number,
    plain_columns,
    plain_tasks,
    rows_of,
    span,
    title_of,
)

PANELS = 6  # of a picture; more go to the next one
CELL = (0.46, 0.28)  # inches
TENTHS = [f"{100 * i // NUM_DEPTH_BINS}%" for i in range(0, NUM_DEPTH_BINS + 1, 2)]
DARK, LIGHT = "#111111", "#fafafa"  # numbers on a heat map, whatever a page makes of INK and PAPER
INTERVALS = "the 95% interval, of several seeds from the lowest to the highest"
MISSING_LOOK: dict[str, Any] = {
    "facecolor": "#d9d9d9",
    "edgecolor": "#a6a6a6",
    "hatch": "////",
    "linewidth": 0,
}


@dataclass
class Picture:
    """A picture of the chapter or task called `of`. about: what it shows, for who cannot see it.
    caption: how it is read."""

    name: str
    of: str
    about: str
    figure: Any
    caption: str = ""

    @cached_property
    def svg(self) -> str:
        """It as SVG."""
        return svg_of(self.figure, self.name)

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.png and NAME.svg."""
        png, svg = (folder / f"{anchor(self.name)}.{kind}" for kind in ("png", "svg"))
        save_figure(self.figure, png)
        write_file(svg, self.svg)
        return [png, svg]


@dataclass(frozen=True)
class Line:
    """A line of a picture: its name, its look, x and (low, middle, high) of each point."""

    name: str
    style: dict[str, Any]
    x: list[float]
    spans: list[tuple[float, float, float]]


@dataclass(frozen=True)
class Panel:
    """A heat map: a name, and the values of each row from left to right, NaN where there is none."""

    name: str
    rows: list[list[float]]


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw what there is, as PNG and SVG; nothing for what is not. Returns the files."""
    return [path for picture in pictures(results) for path in picture.write(folder)]


def pictures(results: Results) -> Iterator[Picture]:
    """The pictures of each chapter, then of its tasks."""
    results = results.plain()
    for chapter in chapters(results):
        if chapter.is_family:
            yield from _family_mean(results, chapter.name)
            yield from _family_grids(results, chapter.name)
        elif chapter.tasks[0].axis is None:
            yield from _plain_bars(results, chapter.name)
        for task in chapter.tasks:
            if task.axis == "length":
                yield from _by_length(results, task)
                yield from _by_depth(results, task)
            elif task.axis == "position":
                yield from _by_position(results, task)
            yield from _by_group(results, task)


def _by_length(results: Results, task: TaskInfo) -> Iterator[Picture]:
    lengths = results.lengths([task.name])
    columns = length_columns(results, task, task.main)
    yield from _curves_or_bars(results, task.name, task.name, task.title, lengths, columns)


def _family_mean(results: Results, family: str) -> Iterator[Picture]:
    """The mean over the tasks against length."""
    tasks = family_of(results, family)
    lengths = results.lengths(task.name for task in tasks)
    columns = [family_columns(results, tasks, length)[-1] for length in lengths]
    if columns and all(column.kind == "mean" for column in columns):
        title = f"{family}: mean of {len(tasks)} tasks"
        yield from _curves_or_bars(results, f"{family}-mean", family, title, lengths, columns)


def _curves_or_bars(
    results: Results, name: str, of: str, title: str, lengths: list[int], columns: list[Column]
) -> Iterator[Picture]:
    """A curve for each model against length; of a single length bars."""
    if not any(column.found for column in columns):
        return
    if len(lengths) == 1:
        title = f"{title}, {length_title(lengths[0])}"
        figure = _bars(results, [(title, columns[0])])
        about = f"Bars: {title}. {_told(results, columns)}"
        yield Picture(name, of, about, figure, f"Thin lines: {INTERVALS}.")
        return
    metric = columns[0].metric
    marks = {
        row: {model.training_length for model in models if model.training_length}
        for row, models in rows_of(results).items()
        if any(column.of(models) for column in columns)
    }
    places = _places(lengths, marks)
    lines = _lines(results, columns, list(places.values()))
    figure, axes = _curves(title, lines, metric)
    _length_axis(axes, places, marks)
    _name_ends(axes, lines, metric)
    name_ticks(axes, {place: length_name(length) for length, place in places.items()})
    about = f"Curves: {title}: {title_of(metric)}, against length. {_told(results, columns, lengths)}"
    yield Picture(name, of, about, figure, f"Bands: {INTERVALS}.")


def _by_position(results: Results, task: TaskInfo) -> Iterator[Picture]:
    for length in lengths_of(results, [task]):
        lines = _position_lines(results, task, length)
        if not lines:
            continue
        metric = task.metrics[task.main]
        title = ", ".join(filter(None, [task.title, length_title(length)]))
        figure, axes = _curves(title, lines, metric)
        starts = [x for line in lines for x in line.x]
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(starts) / 1.2, max(starts) * 1.2)
        powers = [2**i for i in range(40) if min(starts) / 1.2 <= 2**i <= max(starts) * 1.2]
        axes.set_xlabel("position (tokens from the start)")
        _name_ends(axes, lines, metric)
        name_ticks(axes, {x: length_name(round(x)) for x in powers or starts})
        about = f"Curves: {title}: {title_of(metric)}, against position; the table has the numbers."
        name = task.name if length is None else f"{task.name}-{length}"
        yield Picture(name, task.name, about, figure, f"Bands: {INTERVALS}.")


def _position_lines(results: Results, task: TaskInfo, length: int | None) -> list[Line]:
    """A line for each model that has a curve, along the middles of its ranges."""
    lines = []
    for i, (row, models) in enumerate(rows_of(results).items()):
        points: dict[float, list[Estimate]] = {}
        for cell in _cells(results, task, models, length):
            for point in cell.curve:
                if math.isfinite(point.estimate.value):
                    points.setdefault((point.start + point.end) / 2, []).append(point.estimate)
        if points:
            x = sorted(points)
            lines.append(Line(row, look(i), x, [span(points[each]) for each in x]))
    return lines


def _by_depth(results: Results, task: TaskInfo) -> Iterator[Picture]:
    """Length against depth of what is looked for, a heat map for each model."""
    lengths = [
        length
        for length in results.lengths([task.name])
        if any(cell.by_depth for cell in results.find(task.name, length=length))
    ]
    panels = []
    for row, models in rows_of(results).items():
        columns = [_depth_values(_cells(results, task, models, length)) for length in lengths]
        rows = [list(each) for each in zip(*columns, strict=True)]
        if _has_numbers(rows):
            panels.append(Panel(row, rows))
    title = f"{task.title}: where it stood"
    yield from _grids(
        f"{task.name}-depth",
        task.name,
        title,
        panels,
        task.metrics[task.main],
        [length_name(length) for length in lengths],
        None,
        ("length of the text (tokens)", "depth in the text"),
    )


def _depth_values(cells: Sequence[Cell]) -> list[float]:
    """The mean over seeds for each depth."""
    found: list[list[Estimate]] = [[] for _ in range(NUM_DEPTH_BINS)]
    for cell in cells:
        for i, estimate in enumerate(cell.by_depth):
            if math.isfinite(estimate.value):
                found[i].append(estimate)
    return [span(each)[1] for each in found]


def _family_grids(results: Results, family: str) -> Iterator[Picture]:
    """Tasks against lengths, a heat map for each model."""
    tasks = family_of(results, family)
    lengths = results.lengths(task.name for task in tasks)
    blocks = [family_columns(results, tasks, length) for length in lengths]
    blocks = [[column for column in block if column.kind != "mean"] for block in blocks]
    panels = [
        Panel(row, rows)
        for row, models in rows_of(results).items()
        if _has_numbers(rows := [_values(each, models) for each in zip(*blocks, strict=True)])
    ]
    if panels:
        metric = blocks[0][0].metric
        names = [column.head for column in blocks[0]]
        yield from _grids(
            f"{family}-tasks",
            family,
            f"{family}: each task at each length",
            panels,
            metric,
            [length_name(length) for length in lengths],
            names,
            ("length of the text (tokens)", ""),
        )


def _by_group(results: Results, task: TaskInfo) -> Iterator[Picture]:
    """Models against groups, many groups against models; a heat map for each length."""
    rows = rows_of(results)
    for length in lengths_of(results, [task]):
        columns = group_columns(results, task, length)
        kept = {row: models for row, models in rows.items() if any(c.of(models) for c in columns)}
        values = [_values(columns, models) for models in kept.values()]
        if _has_numbers(values):
            names = [column.head for column in columns], list(kept)
            if len(columns) > MANY_GROUPS:
                values, names = [list(each) for each in zip(*values, strict=True)], names[::-1]
            title = ", ".join(filter(None, [f"{task.title}, by group", length_title(length)]))
            yield from _grids(
                f"{task.name}-groups" + ("" if length is None else f"-{length}"),
                task.name,
                title,
                [Panel("", values)],
                task.metrics[task.main],
                *names,
                ("", ""),
            )


def _plain_bars(results: Results, of: str) -> Iterator[Picture]:
    """Bars for each task that has neither family nor axis."""
    columns = plain_columns(results)
    panels = [
        (task.title, column)
        for task, column in zip(plain_tasks(results), columns, strict=True)
        if column.found
    ]
    for i in range(0, len(panels), PANELS):
        part = panels[i : i + PANELS]
        titles = ", ".join(title for title, _ in part)
        about = f"Bars: {titles}. {' '.join(_told(results, [column]) for _, column in part)}"
        name = "scores" if not i else f"scores-{i // PANELS + 1}"
        caption = f"Thin lines: {INTERVALS}; dotted: chance."
        yield Picture(name, of, about, _bars(results, part), caption)


def _curves(title: str, lines: Sequence[Line], metric: Metric) -> tuple[Any, Any]:
    """Lines with their bands; one point alone has an error bar."""
    title = wrapped(title, 7.2, 12)
    height = max(4.2, 2 + len(lines) * LINE) + title.count("\n") * LINE
    figure, axes = new_figure(8, height)
    scale = 100 if metric.is_share else 1
    for line in lines:
        low, middle, high = ([scale * each[k] for each in line.spans] for k in range(3))
        axes.plot(line.x, middle, **line.style, linewidth=2, markersize=5)
        colour = line.style["color"]
        if len(line.x) > 1:
            axes.fill_between(line.x, low, high, color=colour, alpha=0.18, linewidth=0)
        else:
            axes.vlines(line.x, low, high, color=colour, alpha=0.5)
    axes.set_title(title, loc="left", pad=10)
    axes.set_ylabel(wrapped(_unit(metric), 3))
    if metric.is_share:
        axes.set_ylim(-4, 104)
    else:
        log_if_wide(axes, [each[1] for line in lines for each in line.spans])
    if metric.chance is not None:
        _chance_line(axes, scale * metric.chance)
    return figure, axes


def _chance_line(axes: Any, height: float) -> None:
    axes.axhline(height, color="0.45", linestyle=":", linewidth=1)
    axes.annotate(
        "chance",
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color="0.45",
        fontsize=8,
    )


def _places(lengths: Sequence[int], trained: Mapping[str, set[int]]) -> dict[int, float]:
    """Where lengths stand on a logarithmic axis: 0 has its place left of all others."""
    shortest = min(each for each in {1 << 40, *lengths}.union(*trained.values()) if each)
    return {length: length or shortest / 2 for length in lengths}


def _length_axis(axes: Any, places: Mapping[int, float], trained: Mapping[str, set[int]]) -> None:
    """Limits around the lengths; dashed, what the models (by name) were trained at."""
    marks = sorted(set().union(*trained.values()))
    ends = [*places.values(), *marks]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ends) / 1.2, max(ends) * 1.2)
    told = []
    for mark in marks:
        axes.axvline(mark, color="0.45", linestyle="--", linewidth=1)
        of = [short_name(name) for name, each in trained.items() if mark in each]
        whose = "" if len(marks) == 1 else f" ({', '.join(of) if len(of) < 3 else f'{len(of)} models'})"
        told.append(f"{length_name(mark)}{whose}")
    label = "length of the text (tokens)"
    if told:  # below the axis: words beside the lines would lie on each other
        label += "\n" + wrapped(f"dashed: trained at {', '.join(told)}", 4.2)
    axes.set_xlabel(label)


def _name_ends(axes: Any, lines: Sequence[Line], metric: Metric) -> None:
    scale = 100 if metric.is_share else 1
    name_lines(axes, [(scale * line.spans[-1][1], line.name, line.style) for line in lines])


def _bars(results: Results, panels: Sequence[tuple[str, Column]]) -> Any:
    """A panel for each title and column: a bar for each model, its interval and its number."""
    rows = rows_of(results)
    across = 1 if len(panels) == 1 else 2
    down = -(-len(panels) // across)
    room = (7.6 - LETTER * 10 * max(len(short_name(row)) for row in rows)) / across
    words = [(wrapped(title, room, 11), wrapped(_unit(c.metric), room)) for title, c in panels]
    more = max(title.count("\n") + unit.count("\n") for title, unit in words) * LINE
    height = down * (1.3 + 0.27 * len(rows) + more)
    figure, all_axes = new_panels(len(panels), across, 8, height)
    places = range(len(rows))
    for i, (axes, (_, column)) in enumerate(zip(all_axes, panels, strict=True)):
        metric, scale = column.metric, 100 if column.metric.is_share else 1
        for place, models in zip(places, rows.values(), strict=True):
            estimates = column.of(models)
            if not estimates:
                axes.annotate("-", (0, place), xytext=(4, 0), textcoords="offset points", va="center")
                continue
            low, middle, high = (scale * each for each in span(estimates))
            axes.barh(place, middle, color=look(place)["color"], height=0.7)
            axes.hlines(place, low, high, color="0.2", linewidth=1.5)
            end, sign, side = (low, -1, "right") if middle < 0 else (high, 1, "left")
            axes.annotate(
                number(middle / scale, metric, max(each.samples for each in estimates)),
                (end if math.isfinite(end) else middle, place),
                xytext=(4 * sign, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=9,
            )
        if metric.chance is not None:
            axes.axvline(scale * metric.chance, color="0.45", linestyle=":", linewidth=1)
        axes.set_title(words[i][0], loc="left", fontsize=11)
        axes.set_xlabel(words[i][1])
        axes.set_yticks(places, [short_name(row) for row in rows] if i % across == 0 else [])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.15)
        if metric.is_share and axes.get_xlim()[1] < 1:  # all of them none
            axes.set_xlim(0, 100)
        axes.locator_params(axis="x", nbins=4)
    return figure


def _grids(
    name: str,
    of: str,
    title: str,
    panels: Sequence[Panel],
    metric: Metric,
    columns: Sequence[str],
    rows: Sequence[str] | None,
    labels: tuple[str, str],
) -> Iterator[Picture]:
    """Heat maps side by side, two in a row, of one colour scale. rows: None: tenths of a depth."""
    numbers = [each for panel in panels for row in panel.rows for each in row if math.isfinite(each)]
    if not numbers:
        return
    limits = (0.0, 1.0) if metric.is_share else (min(numbers), max(numbers))
    heads = [short_name(column) for column in columns]
    row_names = TENTHS if rows is None else [short_name(row) for row in rows]
    for i in range(0, len(panels), PANELS):
        part = panels[i : i + PANELS]
        across = min(len(part), 2)
        down = -(-len(part) // across)
        shown = [number(each, metric) for each in numbers]
        cell = max(CELL[0], (max(map(len, shown)) + 1) * LETTER * 8)
        slant = {"rotation": 30, "ha": "right"} if max(map(len, heads)) * LETTER * 10 > cell else {}
        beside = max(map(len, row_names)) * LETTER * 10
        widest = max(len(short_name(panel.name)) for panel in part) * LETTER * 10
        width = max(beside + across * (max(len(columns) * cell, widest) + 0.5) + 1.6, 5)
        title_lines = wrapped(title, width - 0.4, 12)
        below = max(map(len, heads)) * LETTER * 5 if slant else 0.2
        height = down * (len(part[0].rows) * CELL[1] + 0.6 + below) + 0.6
        unit = wrapped(_unit(metric), height - 0.6)
        height += title_lines.count("\n") * LINE
        figure, all_axes = new_panels(len(part), across, width, height)
        for k, (axes, panel) in enumerate(zip(all_axes, part, strict=True)):
            mesh = _heat_map(axes, panel, metric, limits)
            axes.set_title(short_name(panel.name), fontsize=10, loc="left")
            axes.set_xticks([c + 0.5 for c in range(len(columns))], heads, **slant)
            _row_ticks(axes, row_names if k % across == 0 else [], rows is None)
            axes.set_ylabel(labels[1] if k % across == 0 else "")
        figure.supxlabel(labels[0], fontsize=10)
        shrink = min(1.0, 3 / height + 0.3)
        figure.colorbar(mesh, ax=all_axes, label=unit, shrink=shrink, format=NUMBER)
        figure.suptitle(title_lines, x=0.01, ha="left", fontsize=12)
        about = f"Heat maps: {title}, {title_of(metric)}: {', '.join(p.name for p in part if p.name)}."
        caption = "Hatched: no sample."
        yield Picture(f"{name}-{i // PANELS + 1}" if i else name, of, about, figure, caption)


def _heat_map(axes: Any, panel: Panel, metric: Metric, limits: tuple[float, float]) -> Any:
    """Coloured cells with their numbers, the first row on top; what is missing is hatched."""
    import numpy as np
    from matplotlib.patches import Rectangle

    values = np.ma.masked_invalid(np.asarray(panel.rows, float))
    rows, columns = values.shape
    axes.add_patch(Rectangle((0, 0), columns, rows, zorder=0, **MISSING_LOOK))
    scale = 100 if metric.is_share else 1
    mesh = axes.pcolormesh(
        scale * values,
        cmap=HEAT if metric.higher_is_better else f"{HEAT}_r",
        vmin=scale * limits[0],
        vmax=scale * limits[1],
        edgecolors=PAPER,
        linewidth=0.5,
    )
    for row in range(rows):
        for column in range(columns):
            value = panel.rows[row][column]
            if math.isfinite(value):
                red, green, blue = (each**2.2 for each in mesh.cmap(mesh.norm(scale * value))[:3])
                is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18  # as far from either
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    number(value, metric),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=DARK if is_light else LIGHT,
                )
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return mesh


def _row_ticks(axes: Any, names: Sequence[str], at_edges: bool) -> None:
    """Names of the rows, or of every second edge between them."""
    places = [2 * i if at_edges else i + 0.5 for i in range(len(names))]
    axes.set_yticks(places, names)


def _lines(results: Results, columns: Sequence[Column], x: Sequence[float]) -> list[Line]:
    """A line for each model that has a number, through the columns where it has one."""
    lines = []
    for i, (row, models) in enumerate(rows_of(results).items()):
        there = [(at, column.of(models)) for at, column in zip(x, columns, strict=True)]
        points = [(at, span(estimates)) for at, estimates in there if estimates]
        if points:
            lines.append(Line(row, look(i), [at for at, _ in points], [each for _, each in points]))
    return lines


def _cells(
    results: Results, task: TaskInfo, models: Sequence[ModelInfo], length: int | None
) -> list[Cell]:
    cells = [cell for model in models for cell in results.find(task.name, model.name)]
    return [cell for cell in cells if cell.length == length]


def _values(columns: Sequence[Column], models: Sequence[ModelInfo]) -> list[float]:
    return [span(column.of(models))[1] for column in columns]


def _has_numbers(rows: Sequence[Sequence[float]]) -> bool:
    return any(math.isfinite(each) for row in rows for each in row)


def _unit(metric: Metric) -> str:
    """A metric as an axis says it."""
    name = f"{metric.title} (%)" if metric.is_share else metric.title
    return name if metric.higher_is_better else f"{name}, lower is better"


def _told(results: Results, columns: Sequence[Column], lengths: Sequence[int] = ()) -> str:
    """A picture's numbers in words: of each model the first and the last."""
    told = []
    for row, models in rows_of(results).items():
        there = [
            (number(span(found)[1], column.metric), column.head)
            for column in columns
            if (found := column.of(models))
        ]
        if there:
            (first, start), (last, end) = there[0], there[-1]
            told.append(f"{row}: {first} at {start}, {last} at {end}" if lengths else f"{row}: {first}")
    return f"{'; '.join(told)}."
