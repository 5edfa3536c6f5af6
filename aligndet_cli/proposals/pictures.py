"""Pictures of proposals: a sheet of images, histograms, and recall by number of proposals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import read_image
from aligndet_cli.drawing import LINE_HEIGHT, draw_grid, draw_text, draw_tile, save_picture
from aligndet_cli.errors import DataError
from aligndet_cli.plotting import COLOURS, DASHES, REFERENCE, SMALL, finish_axes, new_figure, save_figure
from aligndet_cli.proposals.filters import areas_of
from aligndet_cli.proposals.report import sample_boxes

_NUM_BINS = 40
_NUM_TILES, _NUM_COLUMNS = 12, 4
_TILE_HW = (300, 400)
_BOXES_PER_TILE = 15  # more hide the image
# Colours of boxes whose sqrt(box area / image area) is at most the limit; Okabe and Ito's, as in plotting.
_COLOURS = {0.15: "#D55E00", 0.30: "#F0E442", 0.50: "#56B4E9", np.inf: "#CC79A7"}
_GROUP_COLOURS = {
    "all": "#000000",
    "small": COLOURS[1],
    "medium": COLOURS[4],
    "large": COLOURS[5],
    "reach_min_size": COLOURS[2],
}


def draw_proposal_sheet(file: Path, store: ProposalStore, image_set: ImageSet) -> None:
    """Write a JPEG of up to 12 images, evenly spread over those with proposals, with their first 15 boxes."""
    with_boxes = np.flatnonzero(store.counts > 0)
    candidates = with_boxes if len(with_boxes) else np.arange(len(store))
    picks = np.unique(np.linspace(0, len(candidates) - 1, _NUM_TILES).round().astype(int))
    tiles = [_draw_tile(store, int(index), image_set) for index in candidates[picks]]
    save_picture(draw_grid([draw_grid(tiles, _NUM_COLUMNS), _draw_legend()], num_columns=1), file)


def draw_histograms(folder: Path, store: ProposalStore) -> None:
    """Write `count.png`, `size.png` and `aspect.png`: boxes per image, square roots of areas, widths / heights."""
    sample = sample_boxes(store)
    sides = sample[:, 2:] - sample[:, :2]
    _draw_histogram(folder / "count.png", store.counts, "proposals per image", "images")
    _draw_histogram(folder / "size.png", np.sqrt(areas_of(sample)), "size, sqrt(area) in pixels", "proposals")
    ratios = sides[:, 0] / sides[:, 1]
    _draw_histogram(folder / "aspect.png", ratios, "aspect ratio, width / height", "proposals", is_ratio=True)


def draw_recall(file: Path, labels: Mapping[str, Any]) -> None:
    """Write recall at IoU 0.5 and mean best overlap over the number of proposals per image, see `measure_recall`."""
    budgets = labels["budgets"][:-1]
    figure = new_figure(9, 3.9)
    lines: dict[str, Line2D] = {}
    titles = {"recall_at_iou_0.5": "recall at IoU 0.5", "mean_best_overlap": "mean best overlap, IoU"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for place, (name, colour) in enumerate(_GROUP_COLOURS.items()):
            group = labels[name]
            if group["objects"]:
                label = f"{name.replace('_', ' ')} ({group['objects']} objects)"
                dash = DASHES[place % len(DASHES)]
                (lines[label],) = axes.plot(budgets, group["curve"][key][:-1], dash, color=colour)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 1)
        finish_axes(axes, x="proposals per image", y=title)
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=SMALL)
    save_figure(figure, file)


def _draw_tile(store: ProposalStore, index: int, image_set: ImageSet) -> Image.Image:
    """Return an image, its first boxes and a line of text; small boxes are drawn over large ones."""
    image_id, boxes = int(store.image_ids[index]), store.boxes_of(index)
    path = image_set.record(int(np.flatnonzero(image_set.image_ids == image_id)[0])).path
    try:
        image = read_image(path)
    except DataError:  # the image could be read a while ago; a picture is not worth failing for
        return draw_tile(None, boxes[:0], _TILE_HW, colours=(), lines=[f"{path.name}: unreadable"])
    height, width = image.shape[:2]
    sizes = np.sqrt(areas_of(boxes[:_BOXES_PER_TILE]) / (height * width))
    order = np.argsort(-sizes, kind="stable")
    colours = [next(colour for limit, colour in _COLOURS.items() if sizes[place] <= limit) for place in order]
    shown = f"first {_BOXES_PER_TILE} of {len(boxes)}" if len(boxes) > _BOXES_PER_TILE else f"{len(boxes)}"
    line = f"{path.name}  {width}x{height}  {shown} boxes"
    return draw_tile(image, boxes[order], _TILE_HW, colours=colours, lines=[line])


def _draw_legend() -> Image.Image:
    parts, low = [], 0.0
    for limit, colour in _COLOURS.items():
        text = f"> {low:.0%}" if np.isinf(limit) else f"{low:.0%}-{limit:.0%}"
        parts += [Image.new("RGB", (20, LINE_HEIGHT), colour), draw_text([text], 80)]
        low = limit
    return draw_grid([*parts, draw_text(["sqrt(box area / image area)"], 220)], num_columns=len(parts) + 1)


def _draw_histogram(file: Path, values: NDArray, x_label: str, y_label: str, *, is_ratio: bool = False) -> None:
    figure = new_figure(5, 3.2)
    axes = figure.add_subplot()
    if is_ratio:  # 1/2 is as far from 1 as 2
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if values.size:
        low, high = float(values.min()), float(values.max())
        edges = np.geomspace(low, max(high, low * 1.01), _NUM_BINS + 1) if is_ratio else _even_edges(values)
        axes.hist(values, bins=edges.tolist(), color=COLOURS[0])
        median = float(np.median(values))
        axes.axvline(median, color=REFERENCE, linestyle="--", label=f"median {median:.3g}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    finish_axes(axes, x=x_label, y=y_label)
    save_figure(figure, file)


def _even_edges(values: NDArray) -> NDArray[np.floating]:
    """Return edges of equal bins for (N,) values; bins of whole numbers all hold the same count of numbers."""
    if not np.issubdtype(values.dtype, np.integer):
        return np.histogram_bin_edges(values, bins=_NUM_BINS)
    low, high = int(values.min()), int(values.max())
    step = -(-(high - low + 1) // _NUM_BINS)
    return np.arange(low, high + step + 1, step) - 0.5
