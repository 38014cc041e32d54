"""What all pictures share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everlong.files import write_file

# Okabe and Ito's colours, told apart by colour-blind readers too; the yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", "--", ":")
MARKERS = "os^Dv*PX"
HEAT = "viridis"  # light and dark in steps that are even to colour-blind readers too
# Words and axes are INK on PAPER; a page that embeds a picture may put its own colours for them.
INK, PAPER = "#000000", "#ffffff"  # matplotlib's own
LONGEST_NAME = 32
NAME_HEIGHT = 13  # points that a line of words takes


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
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure, and the folder it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix.removeprefix(".") or None)
    write_file(path, file.getvalue())


def svg_of(figure: Any, name: str) -> str:
    """The figure as SVG, its words as text. The same name and figure give the same text."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def short_name(name: str) -> str:
    """A long name with its middle left out."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1].rstrip()}…{name[-half:].lstrip()}"


def name_lines(axes: Any, ends: Sequence[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Write each line's name where it ends: x and y in data, its name, its `look`.

    To be called when the limits stand. Names that would overlap are moved apart.
    """
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    def in_axes(end: tuple[float, float, str, dict[str, Any]]) -> float:
        point = axes.transData.transform(end[:2])
        return float(axes.transAxes.inverted().transform(point)[1])

    ends = sorted(ends, key=in_axes)
    gap = NAME_HEIGHT / (axes.get_position().height * axes.figure.get_figheight() * 72)
    beside = ScaledTranslation(16 / 72, 0, axes.figure.dpi_scale_trans)
    place = blended_transform_factory(axes.transData, axes.transAxes)
    for (x, _, name, style), y in zip(ends, spread([in_axes(end) for end in ends], gap), strict=True):
        sign = Line2D([x], [y], **style, transform=place + beside, clip_on=False)
        axes.add_artist(sign)
        axes.annotate(
            short_name(name),
            (x, y),
            xycoords=place,
            xytext=(24, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
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
