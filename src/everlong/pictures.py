"""What all pictures share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers too; the yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def new_figure() -> tuple[Any, Any]:
    """A figure that needs no screen, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure, and the folder it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
