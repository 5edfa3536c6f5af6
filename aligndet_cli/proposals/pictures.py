"""Pictures of a store: a contact sheet of images with their proposals, histograms, and recall by budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import read_image
from aligndet_cli.errors import DataError
from aligndet_cli.files import write_bytes
from aligndet_cli.plotting import COLOURS, DASHES, JPEG, REFERENCE, SMALL, finish_axes, new_figure, save_figure
from aligndet_cli.proposals.filters import areas_of
from aligndet_cli.proposals.report import sample_boxes

_NUM_BINS = 40
_NUM_TILES, _NUM_COLUMNS = 12, 4
_TILE_HW = (300, 400)
_STRIP = 22  # pixels for a line of text
_BOXES_PER_TILE = 15  # more hide the image
# Box colour (RGB; Okabe-Ito, told apart by everyone) by size: sqrt(box area) / sqrt(image area) up to the limit.
_COLOURS: tuple[tuple[float, tuple[int, int, int]], ...] = (
    (0.15, (213, 94, 0)),
    (0.30, (240, 228, 66)),
    (0.50, (86, 180, 233)),
    (np.inf, (204, 121, 167)),
)
_GROUP_COLOURS = {
    "all": "#000000",
    "small": COLOURS[1],
    "medium": COLOURS[4],
    "large": COLOURS[5],
    "reach_min_size": COLOURS[2],
}


def draw_sheet(file: Path, store: ProposalStore, image_set: ImageSet) -> None:
    """Write a JPEG of up to 12 images, evenly spread over those with proposals, with their first 15 boxes."""
    with_boxes = np.flatnonzero(store.counts > 0)
    candidates = with_boxes if len(with_boxes) else np.arange(len(store))
    picks = np.unique(np.linspace(0, len(candidates) - 1, _NUM_TILES).round().astype(int))
    tiles = [_draw_tile(store, int(index), image_set) for index in candidates[picks]]
    blank = np.full_like(tiles[0], 255)
    num_columns = min(_NUM_COLUMNS, len(tiles))
    tiles += [blank] * (-len(tiles) % num_columns)
    rows = [np.hstack(tiles[start : start + num_columns]) for start in range(0, len(tiles), num_columns)]
    sheet = np.vstack([*rows, _legend(rows[0].shape[1])])
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), JPEG)
    write_bytes(file, encoded.tobytes())


def draw_histograms(folder: Path, store: ProposalStore) -> None:
    """Write `count.png`, `size.png` and `aspect.png`: boxes per image, square roots of areas, widths / heights."""
    sample = sample_boxes(store)
    sides = sample[:, 2:] - sample[:, :2]
    _draw_histogram(folder / "count.png", store.counts, "proposals per image", "images")
    _draw_histogram(folder / "size.png", np.sqrt(areas_of(sample)), "size, sqrt(area) in pixels", "proposals")
    ratios = sides[:, 0] / sides[:, 1]
    _draw_histogram(folder / "aspect.png", ratios, "aspect ratio, width / height", "proposals", is_ratio=True)


def draw_recall(file: Path, labels: Mapping[str, Any]) -> None:
    """Write recall at IoU 0.5 and mean best overlap over the number of proposals per image, by object size.

    Args:
        labels: of `measure_recall`.
    """
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


def _draw_tile(store: ProposalStore, index: int, image_set: ImageSet) -> NDArray[np.uint8]:
    """(tile height + strip, tile width, 3) uint8 RGB: one image, its boxes and a line of text."""
    image_id, boxes = int(store.image_ids[index]), store.boxes_of(index)
    tile = np.full((_TILE_HW[0] + _STRIP, _TILE_HW[1], 3), 255, dtype=np.uint8)
    path = image_set.record(int(np.flatnonzero(image_set.image_ids == image_id)[0])).path
    try:
        image = read_image(path)
    except DataError:  # it could be read a while ago; a picture is not worth failing for
        return _write_text(tile, f"{path.name}: unreadable", 4)
    height, width = image.shape[:2]
    scale = min((_TILE_HW[1] - 8) / width, (_TILE_HW[0] - 4) / height)
    small_hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    resized = cv2.resize(image, small_hw[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    small = np.asarray(resized, dtype=np.uint8)
    _draw_boxes(small, boxes[:_BOXES_PER_TILE] * scale)
    top, left = (_TILE_HW[0] - small_hw[0]) // 2, (_TILE_HW[1] - small_hw[1]) // 2
    tile[top : top + small_hw[0], left : left + small_hw[1]] = small
    shown = f"first {_BOXES_PER_TILE} of {len(boxes)}" if len(boxes) > _BOXES_PER_TILE else f"{len(boxes)}"
    name = path.name if len(path.name) <= 28 else f"...{path.name[-25:]}"
    return _write_text(tile, f"{name}  {width}x{height}  {shown} boxes", 4)


def _draw_boxes(image: NDArray[np.uint8], boxes: NDArray[np.float32]) -> None:
    """Draw (N, 4) xyxy boxes, large ones first so that small ones stay visible."""
    relative = np.sqrt(areas_of(boxes)) / np.sqrt(float(image.shape[0] * image.shape[1]))
    for position in np.argsort(-relative, kind="stable"):
        colour = next(colour for limit, colour in _COLOURS if relative[position] <= limit)
        x1, y1, x2, y2 = np.rint(boxes[position]).astype(int).tolist()
        corners = (x1, y1), (max(x1, x2 - 1), max(y1, y2 - 1))
        cv2.rectangle(image, *corners, (0, 0, 0), 3)  # a dark rim keeps every colour visible on every background
        cv2.rectangle(image, *corners, colour, 2)


def _legend(width: int) -> NDArray[np.uint8]:
    strip = np.full((_STRIP + 8, width, 3), 255, dtype=np.uint8)
    left, low = 8, 0.0
    for limit, colour in _COLOURS:
        cv2.rectangle(strip, (left, 8), (left + 14, 22), colour, -1)
        text = f"> {low:.0%}" if np.isinf(limit) else f"{low:.0%}-{limit:.0%}"
        _write_text(strip, text, left + 20, bottom=20)
        left, low = left + 95, limit
    return _write_text(strip, "sqrt(box area / image area)", left, bottom=20)


def _write_text(image: NDArray[np.uint8], text: str, left: int, bottom: int | None = None) -> NDArray[np.uint8]:
    # cv2's font knows ASCII only and shows anything else as "??".
    ascii_text = text.encode("ascii", "replace").decode()
    baseline = image.shape[0] - 7 if bottom is None else bottom
    cv2.putText(image, ascii_text, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (30, 30, 30), 1, cv2.LINE_AA)
    return image


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
    finish_axes(axes, x=x_label, y=y_label)
    save_figure(figure, file)


def _even_edges(values: NDArray) -> NDArray[np.floating]:
    """Edges of bins of one width; around whole numbers, each of which falls into one bin with as many as others."""
    if not np.issubdtype(values.dtype, np.integer):
        return np.histogram_bin_edges(values, bins=_NUM_BINS)
    low, high = int(values.min()), int(values.max())
    step = -(-(high - low + 1) // _NUM_BINS)
    return np.arange(low, high + step + 1, step) - 0.5
