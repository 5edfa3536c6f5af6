"""Figures from numbers and pixels."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from aligndet_cli.plotting import COLOURS, new_figure, wrap
from aligndet_cli.tools.figures.pretrained import NUM_NEIGHBOURS, Embeddings, neighbour_share

_WIDTH = 7.0  # inches: the text of a page, at which letters of 7 points can still be read
PANEL = (_WIDTH / 3, 1.9)  # inches, of curves
LETTER_SIZE = 0.035  # of labels in images, as a share of their side: 6 points in three columns
_TEXT: dict[Any, float] = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "figure.titlesize": 9,
    "lines.markersize": 4,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
}
_SMALL = 6.5  # points
_MARKERS = ("o", "^", "s")
# Objects by size, as COCO has it: square roots of areas in pixels.
_SIZES = (("small, < 32 px", 0, 32, 4), ("medium, 32 to 96 px", 32, 96, 10), ("large, > 96 px", 96, np.inf, 22))


@contextlib.contextmanager
def for_print() -> Iterator[None]:
    """Set the sizes of letters for figures that are as wide as the text of a page."""
    with rc_context(_TEXT):
        yield


def draw_embeddings(by_title: Mapping[str, Embeddings], title: str, seed: int) -> Figure:
    """Draw a map of embeddings (t-SNE) per title; colours and shapes are classes, sizes are sizes of objects.

    Raises:
        ValueError: fewer than four objects.
    """
    figure = new_figure(_WIDTH, _WIDTH / max(len(by_title), 2) + 0.6)
    panels = figure.subplots(1, len(by_title), squeeze=False)[0]
    for axes, (name, embeddings) in zip(panels, by_title.items(), strict=True):
        points = map_embeddings(embeddings.values, seed)
        for class_id in range(len(embeddings.classes)):
            for _, low, high, area in _SIZES:
                chosen = (embeddings.places == class_id) & (embeddings.sides >= low) & (embeddings.sides < high)
                marker, colour = _MARKERS[class_id], embeddings.colours[class_id]
                x, y = points[chosen].T
                axes.scatter(x, y, s=area, c=colour, marker=marker, alpha=0.7, linewidths=0)
        share, chance = neighbour_share(embeddings)
        num_near = min(NUM_NEIGHBOURS, len(points) - 1)
        told = f"{share:.0%} of the {num_near} nearest are of the same class (by chance {chance:.0%})"
        axes.set_title(f"{name}\n{told}")
        axes.set(xticks=[], yticks=[])
    figure.suptitle(title)
    figure.legend(handles=_legend(next(iter(by_title.values()))), loc="outside lower center", ncols=6, fontsize=_SMALL)
    return figure


def map_embeddings(values: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Return (N, 2) places of (N, D) embeddings."""
    from sklearn.manifold import TSNE

    if len(values) < 4:
        raise ValueError(f"{len(values)} labelled objects are too few for a map")
    perplexity = min(30.0, (len(values) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    return np.asarray(tsne.fit_transform(values))


def _legend(embeddings: Embeddings) -> list[Line2D]:
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, colour, marker in zip(embeddings.classes, embeddings.colours, _MARKERS, strict=False)
    ]
    return handles + [
        Line2D([], [], color="#666666", marker="o", linestyle="", markersize=area**0.5, label=label)
        for label, _, _, area in _SIZES
    ]


def draw_centres(rows: Sequence[tuple[NDArray[np.uint8], Mapping[str, NDArray[np.float64]]]], title: str) -> Figure:
    """Draw centres as points, a row per image and a column per name.

    Args:
        rows: pairs of an (H, W, 3) RGB image and (N, 2) centres, x and y in its pixels, by name.
    """
    figure, panels = _panels(rows[0][0], len(rows), len(rows[0][1]), title)
    for line, (pixels, by_name) in zip(panels, rows, strict=True):
        for axes, (name, centres) in zip(line, by_name.items(), strict=True):
            axes.imshow(pixels)
            x, y = centres.T
            axes.scatter(x, y, s=7, c=COLOURS[4], edgecolors="black", linewidths=0.4)
            axes.set(xlim=(-0.5, pixels.shape[1] - 0.5), ylim=(pixels.shape[0] - 0.5, -0.5))
            axes.set_title(wrap(f"{name}: {len(centres)} boxes", 34))
    return figure


def draw_image_rows(rows: Sequence[Mapping[str, NDArray[np.uint8]]], title: str) -> Figure:
    """Draw rows of (H, W, 3) RGB pictures of one image, by their captions."""
    figure, panels = _panels(next(iter(rows[0].values())), len(rows), len(rows[0]), title)
    for line, by_name in zip(panels, rows, strict=True):
        for axes, (name, pixels) in zip(line, by_name.items(), strict=True):
            axes.imshow(pixels)
            axes.set_title(wrap(name, 34))
    return figure


def _panels(first: NDArray[np.uint8], num_rows: int, num_columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with rows of empty panels, which have about the shape of the first (H, W, 3) image."""
    width = _WIDTH / num_columns
    height = min(max(width * first.shape[0] / first.shape[1], width / 2), 1.2 * width)
    figure = new_figure(_WIDTH, (height + 0.25) * num_rows + 0.3)
    figure.suptitle(title)
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in panels.reshape(-1):
        axes.set_axis_off()
    return figure, panels.tolist()
