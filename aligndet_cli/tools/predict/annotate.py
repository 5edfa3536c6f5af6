"""Boxes, masks, names and scores drawn into an image, readable whatever its size."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from aligndet_cli.plotting import COLOURS, hex_to_rgb, ink_on, shorten

_SMALLEST_SIDE = 480  # images whose long side is shorter are enlarged, or their labels would hide them
_MASK_OPACITY = 0.35
_LONGEST_NAME = 24

Rectangle = tuple[float, float, float, float]


def annotate(
    pixels: NDArray[np.uint8], entries: Sequence[Mapping[str, Any]], names: Mapping[int, str], places: Mapping[int, int]
) -> Image.Image:
    """A copy of an image with detections drawn in, the best on top.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        entries: COCO results, or labels without score; `bbox` is xywh, `segmentation` an RLE of the image's size.
        names: class name by category id.
        places: by category id, its place among the classes, which decides its colour.
    """
    height, width = pixels.shape[:2]
    scale = max(1, math.ceil(_SMALLEST_SIDE / max(height, width)))
    ordered = sorted(entries, key=lambda entry: entry.get("score", 1.0))
    colours = [hex_to_rgb(COLOURS[places[entry["category_id"]] % len(COLOURS)]) for entry in ordered]
    image = Image.fromarray(_with_masks(pixels, ordered, colours)).resize((width * scale, height * scale))
    draw = ImageDraw.Draw(image)
    size = max(11, round(0.022 * math.sqrt(image.width * image.height)))
    line = max(2, size // 6)
    boxes = []
    for entry, colour in zip(ordered, colours, strict=True):
        x, y, w, h = (scale * value for value in entry["bbox"])
        boxes.append((x, y, max(x + w, x + 1), max(y + h, y + 1)))
        draw.rectangle(boxes[-1], outline="black", width=line + 2)  # a rim: visible on every background
        draw.rectangle(_inset(boxes[-1], 1), outline=colour, width=line)
    taken: list[Rectangle] = []
    font = _font(size)
    for entry, colour, box in reversed(list(zip(ordered, colours, boxes, strict=True))):
        text = shorten(names[entry["category_id"]], _LONGEST_NAME) + (
            f" {entry['score']:.2f}" if "score" in entry else ""
        )
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        tag = _place(box, (right - left + size * 0.5, bottom - top + size * 0.4), (image.width, image.height), taken)
        taken.append(tag)
        draw.rectangle(tag, fill=colour)
        draw.text((tag[0] + size * 0.25 - left, tag[1] + size * 0.2 - top), text, fill=ink_on(colour), font=font)
    return image


def _with_masks(
    pixels: NDArray[np.uint8], entries: Sequence[Mapping[str, Any]], colours: Sequence[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    if not any("segmentation" in entry for entry in entries):
        return pixels
    mixed = pixels.copy()
    for entry, colour in zip(entries, colours, strict=True):
        if "segmentation" in entry:
            mask = coco_mask.decode(entry["segmentation"]).astype(bool)
            mixed[mask] = np.rint((1 - _MASK_OPACITY) * mixed[mask] + _MASK_OPACITY * np.array(colour))
    return mixed


def _place(
    box: Rectangle, size: tuple[float, float], image_size: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Where a tag goes: above the box, else inside of it, else below; where possible not over another tag."""
    width, height = size
    x = max(min(box[0], image_size[0] - width), 0)
    tops = [box[1] - height, box[1], box[3] - height, box[3]]
    candidates = [(x, top, x + width, top + height) for top in tops if 0 <= top <= image_size[1] - height]
    candidates = candidates or [(x, 0.0, x + width, height)]  # the image is smaller than its tag
    return next((tag for tag in candidates if not any(_overlap(tag, other) for other in taken)), candidates[0])


def _overlap(first: Rectangle, second: Rectangle) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _inset(box: Rectangle, by: float) -> Rectangle:
    """The box without its rim, or the box where nothing would be left."""
    inner = (box[0] + by, box[1] + by, box[2] - by, box[3] - by)
    return inner if inner[2] > inner[0] and inner[3] > inner[1] else box


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib brings a font with Latin, Greek and Cyrillic letters; Pillow's own has Latin ones only.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
