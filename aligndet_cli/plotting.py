"""Style of all plots, and a guard that keeps a drawing error from failing a run.

Figures are objects (`new_figure`), never made through pyplot, which needs a display and keeps global state. Files
hold no date and no version, so that the same numbers give the same bytes.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from aligndet_cli.files import write_bytes
from aligndet_cli.logs import logger

# Okabe and Ito's colours, which people with any colour vision can tell apart, the most distant ones first; without
# yellow and black, which are too faint on white and on photographs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE = "#666666"  # lines that are no measurements: chance levels, medians, diagonals
DASHES = ("-", "--", ":", "-.")
SMALL = 8  # points, for legends and numbers inside of a picture
_DPI = 100


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of this size in inches (of 100 pixels), which lays out its axes so that nothing overlaps."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish_axes(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Add title, labels (with units), a faint grid and, for named curves, a legend; remove the box around the axes."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=SMALL)


def save_figure(figure: Figure, file: Path) -> None:
    """Write a PNG, completely or not at all, and make its folder; `$` in texts is a letter, not mathematics."""
    for text in figure.findobj(Text):  # the numbers of axes, which may be mathematics, are made later
        if isinstance(text, Text) and "$" in text.get_text():
            text.set_parse_math(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e.g. a glyph missing from the font
        figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes(file, buffer.getvalue())


@contextlib.contextmanager
def never_failing(file: Path) -> Iterator[None]:
    """Turn any error in the block into a warning that names the picture, so that it cannot cost a run its results."""
    try:
        yield
    except Exception as error:
        logger.warning("%s was not drawn: %s: %s", file, type(error).__name__, error)


def shorten(text: str, length: int = 22) -> str:
    """Cut a text that is too long, and end it with dots."""
    return text if len(text) <= length else text[: length - 3] + "..."
