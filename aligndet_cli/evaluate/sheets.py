"""Images with their ground truth beside the detections."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import read_image
from aligndet_cli.plotting import COLOURS, new_figure, shorten

NUM_IMAGES = 6
MAX_BOXES_NAMED = 25

Entries = Sequence[Mapping[str, Any]]


def draw_detections(
    image_set: ImageSet, ground_truth: Mapping[str, Any], predictions: Entries, analysis: Mapping[str, Any], title: str
) -> Figure:
    """A few images, evenly spread over those with ground truth; of each pair, labels left and detections right."""
    labelled = {entry["image_id"] for entry in ground_truth["annotations"]}
    with_truth = [index for index, image_id in enumerate(image_set.image_ids) if int(image_id) in labelled]
    places = np.linspace(0, len(with_truth) - 1, min(len(with_truth), NUM_IMAGES)).astype(np.int64)
    chosen = [(with_truth[place], "") for place in places]
    threshold = analysis["confusion"]["score_threshold"]
    return _draw_pairs(image_set, chosen, (ground_truth["annotations"], predictions), threshold, f"Images - {title}")


def draw_best_and_worst(
    image_set: ImageSet, ground_truth: Mapping[str, Any], predictions: Entries, analysis: Mapping[str, Any], title: str
) -> Figure:
    """The images with the best F1 and those with the worst, in this order; see `analysis.confusion_counts`."""
    place_of = {int(image_id): index for index, image_id in enumerate(image_set.image_ids)}
    worst = analysis["worst_images"][: NUM_IMAGES // 2]
    best = [entry for entry in analysis["best_images"] if entry not in worst][: NUM_IMAGES // 2]
    chosen = [
        (
            place_of[entry["image_id"]],
            f"{rank}: {entry['right']} right, {entry['wrong']} wrong, {entry['missed']} missed",
        )
        for rank, entries in (("best", best), ("worst", worst))
        for entry in entries
    ]
    threshold = analysis["confusion"]["score_threshold"]
    title = f"Best and worst images - {title}"
    return _draw_pairs(image_set, chosen, (ground_truth["annotations"], predictions), threshold, title)


def _draw_pairs(
    image_set: ImageSet,
    chosen: Sequence[tuple[int, str]],
    entries: tuple[Entries, Entries],
    threshold: float,
    title: str,
) -> Figure:
    """Two images per row.

    Args:
        chosen: positions in the set, with what to say about each.
        entries: ground truths and predictions of all images.
        threshold: least score that is shown.
    """
    truths, found = _by_image(entries[0]), _by_image([entry for entry in entries[1] if entry["score"] >= threshold])
    num_rows = max((len(chosen) + 1) // 2, 1)
    figure = new_figure(15, 3.2 * num_rows + 0.7)
    axes = figure.subplots(num_rows, 4, squeeze=False).reshape(-1, 2)  # one pair per image
    for panel in axes.reshape(-1):
        panel.set_axis_off()
    for (left, right), (index, remark) in zip(axes, chosen, strict=False):
        record = image_set.record(index)
        pixels = read_image(record.path)
        for panel, of_image in ((left, truths), (right, found)):
            owned = of_image.get(record.image_id, [])
            panel.imshow(pixels)
            _draw_boxes(panel, owned, image_set)
            heading = shorten(record.file_name, 40) if panel is left else remark
            what = "ground truth" if panel is left else "detections"
            panel.set_title(f"{heading}\n{what}: {len(owned)}", fontsize=9)
    figure.suptitle(f"{title}\nof each pair: ground truth left, detections of score >= {threshold:.2f} right")
    return figure


def _draw_boxes(axes: Axes, entries: Entries, image_set: ImageSet) -> None:
    class_ids = {category.category_id: class_id for class_id, category in enumerate(image_set.categories)}
    taken: list[tuple[float, float]] = []
    for position, entry in enumerate(sorted(entries, key=lambda entry: -entry.get("score", 1.0))):
        class_id = class_ids[entry["category_id"]]
        left, top, width, height = entry["bbox"]
        # A dark rim keeps every colour visible on every background.
        rim: list[AbstractPathEffect] = [withStroke(linewidth=3.2, foreground="black", alpha=0.6)]
        style = ":" if entry.get("iscrowd") else "-"
        colour = COLOURS[class_id % len(COLOURS)]
        box = Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=1.6, linestyle=style)
        box.set_path_effects(rim)
        axes.add_patch(box)
        if position >= MAX_BOXES_NAMED:
            continue
        score = f" {entry['score']:.2f}" if "score" in entry else ""
        place = _label_place((left, top), (axes.get_xlim()[1], axes.get_ylim()[0]), taken)
        text = shorten(image_set.categories[class_id].name, 14) + score
        label = axes.text(*place, text, fontsize=6.5, color="white", va="bottom")
        label.set_path_effects([withStroke(linewidth=1.8, foreground="black")])
        label.set_clip_on(True)


def _label_place(
    corner: tuple[float, float], image_size: tuple[float, float], taken: list[tuple[float, float]]
) -> tuple[float, float]:
    """Lower left corner of a label: above the upper left corner of its box, or below labels that are there already."""
    width, height = 0.2 * image_size[0], 0.045 * image_size[1]  # of a label, about
    left, bottom = corner[0], max(corner[1], height)
    while any(abs(left - x) < width and abs(bottom - y) < height for x, y in taken):
        bottom += height
    taken.append((left, bottom))
    return left, bottom


def _by_image(entries: Entries) -> dict[int, list[Mapping[str, Any]]]:
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        grouped.setdefault(entry["image_id"], []).append(entry)
    return grouped
