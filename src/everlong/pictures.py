"""What all pictures share."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_file
from .words import plain

# Okabe and Ito's colours, told apart by colour-blind readers too; the yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", "--", ":")
MARKERS = "os^Dv*PX"
HEAT = "viridis"  # light and dark in steps that are even to colour-blind readers too
# Words and axes are INK on PAPER; a page that embeds a picture may put its own colours for them.
INK, PAPER = "#000000", "#ffffff"  # matplotlib's own
LONGEST_NAME = 32
NUMBER = "{x:,.10g}"  # on axes: no power or distance apart from the ticks
NAME_HEIGHT = 13  # points that a line of words takes
LINE = NAME_HEIGHT / 72  # inches
LETTER = 0.008  # inches that a letter takes, on average, by points of its size
WIDE = 20  # values differ by this factor: their axis is logarithmic


def look(i: int) -> dict[str, Any]:
    """Colour, style and marker of line i. The colours come again with another style."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": STYLES[i // len(COLOURS) % len(STYLES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def new_figure(width: float = 8, height: float = 4.5) -> tuple[Any, Any]:
    """A figure (inches) that needs no screen, and its axes."""
    figure, axes = new_panels(1, 1, width, height)
    axes[0].grid(axis="y", alpha=0.25)
    return figure, axes[0]


def new_panels(count: int, across: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure (inches) that needs no screen, with so many axes, `across` of them side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(-(-count // across), across, i + 1) for i in range(count)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        for axis in (each.xaxis, each.yaxis):
            axis.set_major_formatter(NUMBER)
    return figure, axes


def plain_words(figure: Any) -> None:
    """Words as they stand: a $ is no formula, and what does not show is written out. Numbers at an axis
    are formulas of matplotlib's own."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    formulas = (LogFormatter, ScalarFormatter)
    numbers: set[Any] = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), formulas):
            numbers.update(axis.get_majorticklabels())
        if isinstance(axis.get_minor_formatter(), formulas):
            numbers.update(axis.get_minorticklabels())
    for text in figure.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)
            text.set_text(plain(text.get_text()))


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure, and the folder it goes to."""
    plain_words(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix.removeprefix(".") or None)
    write_file(path, file.getvalue())


def svg_of(figure: Any, name: str) -> str:
    """The figure as SVG, its words as text. The same name and figure give the same text."""
    from matplotlib import rc_context

    plain_words(figure)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def short_name(name: str) -> str:
    """A long name with its middle left out."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1].rstrip()}…{name[-half:].lstrip()}"


def wrapped(text: str, inches: float, points: float = 10) -> str:
    """The text in lines of about so many inches, in letters of so many points."""
    width = max(int(inches / (LETTER * points)), 12)
    return textwrap.fill(text, width, break_on_hyphens=False)


def log_if_wide(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis for values that differ widely, with as few ticks as can be read."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [each for each in values if math.isfinite(each)]
    low, high = min(values, default=0), max(values, default=0)
    if low <= 0 or high <= WIDE * low:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(NUMBER)
    axes.yaxis.set_minor_formatter(NullFormatter())


def name_ticks(axes: Any, names: Mapping[float, str]) -> None:
    """Ticks of the x axis at these places, with the last name and as many before it as do not touch.

    To be called when all else is drawn, and the limits stand.
    """
    places = sorted(names)
    axes.set_xticks(places, [names[place] for place in places])
    axes.minorticks_off()
    plain_words(axes.figure)
    axes.figure.draw_without_rendering()
    kept: list[float] = []
    free = math.inf
    for place, label in zip(reversed(places), reversed(axes.get_xticklabels()), strict=True):
        box = label.get_window_extent()
        if box.x1 < free:
            kept.append(place)
            free = box.x0 - box.height / 3
    axes.set_xticks(kept, [names[place] for place in kept])


def name_lines(axes: Any, ends: Sequence[tuple[float, str, dict[str, Any]]]) -> None:
    """Write each line's name beside the axes, at the height where it ends: y in data, its name, its
    `look`.

    To be called when the limits stand. Names that would overlap are moved apart.
    """
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    def in_axes(end: tuple[float, str, dict[str, Any]]) -> float:
        point = axes.transData.transform((1, end[0]))
        return float(axes.transAxes.inverted().transform(point)[1])

    ends = sorted(ends, key=in_axes)
    gap = NAME_HEIGHT / (axes.get_position().height * axes.figure.get_figheight() * 72)
    beside = ScaledTranslation(10 / 72, 0, axes.figure.dpi_scale_trans)
    for (_, name, style), y in zip(ends, spread([in_axes(end) for end in ends], gap), strict=True):
        sign = Line2D([1], [y], **style, transform=axes.transAxes + beside, clip_on=False)
        axes.add_artist(sign)
        axes.annotate(
            short_name(name),
            (1, y),
            xycoords="axes fraction",
            xytext=(18, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1], lowest first, moved apart to be `gap` from each other where there is room."""
    gap = min(gap, 1 / max(len(places) - 1, 1))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(place, 0.0))
    ceiling = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved
