"""Images with boxes, masks, names and scores, readable in images of any size."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from pycocotools import mask as coco_mask

from aligndet_cli.data.dataset import Category, class_labels
from aligndet_cli.drawing import LETTER_SIZE, corners_of, draw_boxes
from aligndet_cli.plotting import COLOURS, shorten

_SMALLEST_SIDE = 480  # images whose long side is shorter are enlarged, or their labels would hide them
_MASK_OPACITY = 0.35
_LONGEST_NAME = 24


def annotate(
    pixels: NDArray[np.uint8],
    entries: Sequence[Mapping[str, Any]],
    categories: Sequence[Category],
    letter_size: float = LETTER_SIZE,
) -> Image.Image:
    """Return a copy of an image with detections, the best on top; small images are enlarged.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        entries: COCO results, or labels without score; `bbox` is xywh in pixels, `segmentation` an RLE of size H x W.
        categories: classes, whose order decides the colours.
        letter_size: see `draw_boxes`.
    """
    height, width = pixels.shape[:2]
    scale = max(1, math.ceil(_SMALLEST_SIDE / max(height, width)))
    ordered = sorted(entries, key=lambda entry: entry.get("score", 1.0))
    places = {category.category_id: place for place, category in enumerate(categories)}
    class_ids = [places[entry["category_id"]] for entry in ordered]
    colours = [COLOURS[class_id % len(COLOURS)] for class_id in class_ids]
    names = class_labels({category.category_id: shorten(category.name, _LONGEST_NAME) for category in categories})
    scores = [f" {entry['score']:.2f}" if "score" in entry else "" for entry in ordered]
    image = Image.fromarray(_with_masks(pixels, ordered, colours)).resize((width * scale, height * scale))
    labels = [f"{names[entry['category_id']]}{score}" for entry, score in zip(ordered, scores, strict=True)]
    draw_boxes(image, scale * corners_of(ordered), colours, labels, letter_size=letter_size)
    return image


def _with_masks(
    pixels: NDArray[np.uint8], entries: Sequence[Mapping[str, Any]], colours: Sequence[str]
) -> NDArray[np.uint8]:
    mixed = pixels.copy()
    for entry, colour in zip(entries, colours, strict=True):
        if "segmentation" in entry:
            mask = coco_mask.decode(entry["segmentation"]).astype(bool)
            tint = _MASK_OPACITY * np.array(ImageColor.getrgb(colour))
            mixed[mask] = np.rint((1 - _MASK_OPACITY) * mixed[mask] + tint)
    return mixed
