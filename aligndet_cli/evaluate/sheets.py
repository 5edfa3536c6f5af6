"""Images with their ground truth beside the detections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aligndet_cli.data.dataset import ImageSet, class_labels
from aligndet_cli.data.images import read_image
from aligndet_cli.drawing import corners_of, draw_grid, draw_text, draw_tile
from aligndet_cli.metrics.coco import CocoEvaluation
from aligndet_cli.plotting import COLOURS, shorten

NUM_IMAGES = 6
MAX_BOXES_NAMED = 25
_TILE_HW, _NUM_COLUMNS = (280, 370), 4

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Drawing:
    """Content of the pictures.

    Attributes:
        evaluation: numbers and curves for boxes.
        analysis: content of `analysis.json`.
        ground_truth: COCO json dict.
        predictions: COCO results.
        title: run and split.
    """

    evaluation: CocoEvaluation
    analysis: Mapping[str, Any]
    ground_truth: Mapping[str, Any]
    predictions: Entries
    image_set: ImageSet
    title: str


def draw_detections(drawing: Drawing) -> Image.Image:
    """Return a few images, evenly spread over those with ground truth, as pairs: labels left, detections right."""
    labelled = {entry["image_id"] for entry in drawing.ground_truth["annotations"]}
    with_truth = [index for index, image_id in enumerate(drawing.image_set.image_ids) if int(image_id) in labelled]
    places = np.linspace(0, len(with_truth) - 1, min(len(with_truth), NUM_IMAGES)).astype(np.int64)
    return _draw_pairs(drawing, [(with_truth[place], "") for place in places], "Images")


def draw_best_and_worst(drawing: Drawing) -> Image.Image:
    """Return the images with the best F1, then those with the worst, as pairs like `draw_detections`."""
    place_of = {int(image_id): index for index, image_id in enumerate(drawing.image_set.image_ids)}
    worst = drawing.analysis["worst_images"][: NUM_IMAGES // 2]
    best = [entry for entry in drawing.analysis["best_images"] if entry not in worst][: NUM_IMAGES // 2]
    chosen = [
        (place_of[one["image_id"]], f"{rank}: {one['right']} right, {one['wrong']} wrong, {one['missed']} missed")
        for rank, some in (("best", best), ("worst", worst))
        for one in some
    ]
    return _draw_pairs(drawing, chosen, "Best and worst images")


def _draw_pairs(drawing: Drawing, chosen: Sequence[tuple[int, str]], title: str) -> Image.Image:
    """Return two pairs of images per row, under a title; `chosen` are positions in the set, each with a remark."""
    threshold = drawing.analysis["confusion"]["score_threshold"]
    truths = _by_image(drawing.ground_truth["annotations"])
    found = _by_image([entry for entry in drawing.predictions if entry["score"] >= threshold])
    tiles = []
    for index, remark in chosen:
        record = drawing.image_set.record(index)
        pixels = read_image(record.path)
        for what, heading, of_image in (("ground truth", record.file_name, truths), ("detections", remark, found)):
            owned = of_image.get(record.image_id, [])
            tiles.append(_draw_image(pixels, owned, drawing.image_set, [heading, f"{what}: {len(owned)}"]))
    explanation = f"of each pair: ground truth left, detections of score >= {threshold:.2f} right"
    head = draw_text([f"{title} - {drawing.title}", explanation], width=_NUM_COLUMNS * _TILE_HW[1])
    return draw_grid([head, draw_grid(tiles, _NUM_COLUMNS)] if tiles else [head], num_columns=1)


def _draw_image(pixels: NDArray[np.uint8], entries: Entries, image_set: ImageSet, lines: Sequence[str]) -> Image.Image:
    """Return a tile of an (H, W, 3) uint8 RGB image and its COCO entries, the best on top, 25 and crowds named."""
    class_ids = {category.category_id: class_id for class_id, category in enumerate(image_set.categories)}
    names = class_labels({category.category_id: shorten(category.name, 14) for category in image_set.categories})
    ordered = sorted(entries, key=lambda entry: entry.get("score", 1.0))
    colours, labels = [], []
    for place, entry in enumerate(ordered, start=1):
        colours.append(COLOURS[class_ids[entry["category_id"]] % len(COLOURS)])
        crowd = " (crowd)" if entry.get("iscrowd") else ""
        score = f" {entry['score']:.2f}" if "score" in entry else ""
        is_named = crowd or place > len(ordered) - MAX_BOXES_NAMED
        labels.append(names[entry["category_id"]] + crowd + score if is_named else "")
    return draw_tile(pixels, corners_of(ordered), _TILE_HW, colours=colours, labels=labels, lines=lines)


def _by_image(entries: Entries) -> dict[int, list[Mapping[str, Any]]]:
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        grouped.setdefault(entry["image_id"], []).append(entry)
    return grouped
