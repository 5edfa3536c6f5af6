"""Style of all plots, and a guard that keeps a drawing error from failing a run.

Figures are objects (`new_figure`), never made through pyplot, which needs a display and keeps global state. Files
hold no date and no version, so that the same numbers give the same bytes.
"""

import colorsys
import contextlib
import io
import itertools
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from aligndet_cli.errors import NO_ROOM
from aligndet_cli.files import write_bytes
from aligndet_cli.fonts import FONT_FILE, set_text
from aligndet_cli.logs import logger

# Okabe and Ito's colours, which people with any colour vision can tell apart, the most distant ones first; without
# yellow and black, which are too faint on white and on photographs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE = "#666666"  # lines that are no measurements: chance levels, medians, diagonals
DASHES = ("-", "--", ":", "-.")
SMALL = 8  # points, for legends and numbers inside of a picture
FORMATS = ("png", "pdf", "svg")
_GOLDEN_ANGLE = (3 - 5**0.5) / 2  # of a turn: the next hue is far from all before it
_DPI = 100
_NO_DATES: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}


def all_colours() -> Iterator[str]:
    """Yield colours without end, none twice: `COLOURS`, then hues a golden angle apart, dark, middling and light."""
    yield from COLOURS
    given = set(COLOURS)
    for place in itertools.count():
        hue, lightness = (0.98 + place * _GOLDEN_ANGLE) % 1, (0.25, 0.4, 0.6)[place % 3]
        red, green, blue = (round(255 * value) for value in colorsys.hls_to_rgb(hue, lightness, 0.9))
        colour = f"#{red:02X}{green:02X}{blue:02X}"
        if colour not in given:
            given.add(colour)
            yield colour


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
        axes.legend(fontsize=min(SMALL, rcParams["font.size"]))


def save_figure(figure: Figure, file: Path, *, dpi: int = _DPI) -> None:
    """Write a PNG, PDF or SVG after its name, completely or not at all, and make its folder.

    PDF holds its fonts, SVG their outlines. `$` in texts is a letter, not mathematics.

    Args:
        dpi: pixels per inch, also of images in PDF and SVG.
    """
    for text in figure.findobj(Text):  # the numbers of axes, which may be mathematics, are made later
        if isinstance(text, Text):
            _make_readable(text)
    file.parent.mkdir(parents=True, exist_ok=True)
    buffer, kind = io.BytesIO(), file.suffix.removeprefix(".")
    with warnings.catch_warnings(), rc_context({"pdf.fonttype": 42, "svg.hashsalt": "aligndet"}):
        warnings.simplefilter("ignore")  # e.g. axes without room for their texts
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=_NO_DATES[kind])
    write_bytes(file, buffer.getvalue())


def _make_readable(text: Text) -> None:
    """Take letters as they are, in a font that has them."""
    content = text.get_text()
    if "$" in content:
        text.set_parse_math(False)
    if content.isascii():
        return
    lines = content.split("\n")
    font, _ = set_text("".join(lines))
    if font != FONT_FILE:
        text.get_fontproperties().set_file(font)
    text.set_text("\n".join(set_text(line)[1] for line in lines))


@contextlib.contextmanager
def never_failing(file: Path) -> Iterator[None]:
    """Turn an error in the block into a warning that names the picture, so that it cannot cost a run its results.

    A full disk is none of them: the run ends and can be continued, while a finished run would never get its picture.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        logger.warning("%s was not drawn: %s: %s", file, type(error).__name__, error)


def shorten(text: str, length: int = 22) -> str:
    """Cut a text that is too long, and end it with dots. Letters that no font has become numbers, see `fonts`."""
    text = set_text(text)[1]
    return text if len(text) <= length else text[: length - 3] + "..."


def wrap(text: str, length: int) -> str:
    """Break a name that is too long into lines, at spaces and hyphens if it has any."""
    return textwrap.fill(text, length)
