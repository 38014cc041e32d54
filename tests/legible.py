"""Measures whether a picture can be read: what of its words is cut off or overprinted."""

import numpy as np
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Affine2D

SLACK = 2  # pixels of 150 an inch; a font's box is larger than its letters


def faults(figure):
    """What a reader of the figure misses: words outside it, and words that lie on others."""
    figure.canvas.draw()
    size, found = figure.bbox, []
    words = [(text.get_text(), _box(text, figure)) for text in shown_words(figure)]
    ends = [(box.vertices.min(0), box.vertices.max(0)) for _, box in words]
    for (text, _), (low, high) in zip(words, ends, strict=True):
        if min(low) < -SLACK or high[0] > size.width + SLACK or high[1] > size.height + SLACK:
            found.append(f"outside: {text!r}")
    lows, highs = (np.array(each) for each in zip(*ends, strict=True))
    near = (lows[:, None] < highs).all(-1) & (lows < highs[:, None]).all(-1)
    for i, j in np.argwhere(np.triu(near, 1)):
        (one, first), (other, second) = words[i], words[j]
        if first.intersects_path(second):
            found.append(f"overprinted: {one!r} and {other!r}")
    return found


def shown_words(figure):
    """All texts of a drawn figure that are to be seen."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            told = {id(tick) for tick in axis._update_ticks()}  # those within the limits
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {
                id(label)
                for tick in ticks
                for label in (tick.label1, tick.label2)
                if id(tick) not in told or not label.get_visible()
            }
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]


def _box(text, figure):
    """The rectangle that a text takes, as it is turned, a little smaller."""
    renderer, angle = figure.canvas.get_renderer(), text.get_rotation()
    around = Text.get_window_extent(text, renderer)
    text.set_rotation(0)
    flat = Text.get_window_extent(text, renderer)
    text.set_rotation(angle)
    middle = ((around.x0 + around.x1) / 2, (around.y0 + around.y1) / 2)
    width, height = flat.width / 2 - SLACK, flat.height / 2 - SLACK
    corners = [(-width, -height), (width, -height), (width, height), (-width, height)]
    turned = Affine2D().rotate_deg(angle).translate(*middle).transform(corners)
    return Path([*turned, turned[0]], closed=True)
