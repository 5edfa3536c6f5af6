"""Finds texts of a figure that cover each other, or that the figure cuts."""

import itertools
from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

_TOUCHING = 1.0  # pixels that boxes around texts may share


def clashing_texts(figure: Figure) -> list[str]:
    """Pairs that overlap, and texts that stick out of the figure."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    hidden = {id(label) for axes in figure.axes for label in _beyond_the_limits(axes)}
    texts = figure.findobj(lambda one: isinstance(one, Text) and one.get_visible() and one.get_text().strip())
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if id(text) not in hidden]
    found = [
        f"{one!r} and {other!r}"
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > _TOUCHING and min(a.y1, b.y1) - max(a.y0, b.y0) > _TOUCHING
    ]
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        if box.x0 < -_TOUCHING or box.y0 < -_TOUCHING or box.x1 > width + _TOUCHING or box.y1 > height + _TOUCHING:
            found.append(f"{text!r} is cut")
    return found


def _beyond_the_limits(axes: Axes) -> Iterator[Text]:
    """Labels of ticks that are not drawn."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)
