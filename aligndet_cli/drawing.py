"""Pictures made of tiles: images with boxes and labels, and lines of text."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from aligndet_cli.files import write_bytes
from aligndet_cli.fonts import font_of, set_text

LINE_HEIGHT = 24  # pixels, of a line of text
LETTER_SIZE = 0.022  # of labels, as a share of the side of a square of the image's area
_TEXT_SIZE, _INK, _BEHIND_IMAGES = 13, "#1e1e1e", "#e8e8e8"

Rectangle = tuple[float, float, float, float]  # xyxy


def draw_tile(
    pixels: NDArray[np.uint8] | None,
    boxes: NDArray,
    size_hw: tuple[int, int],
    *,
    colours: Sequence[str],
    labels: Sequence[str] = (),
    lines: Sequence[str] = (),
) -> Image.Image:
    """Return an image with boxes, scaled to fit into a tile, with lines of text below.

    Args:
        pixels: (H, W, 3) uint8 RGB; None leaves the tile empty.
        boxes: (N, 4) xyxy in pixels of the image, with `colours` and `labels` as in `draw_boxes`.
        size_hw: size of the tile without the text.
    """
    tile = Image.new("RGB", (size_hw[1], size_hw[0]), _BEHIND_IMAGES)
    if pixels is not None:
        scale = min(size_hw[0] / pixels.shape[0], size_hw[1] / pixels.shape[1])
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        image = Image.fromarray(pixels).resize((width, height), reducing_gap=2.0)
        draw_boxes(image, boxes * scale, colours, labels)
        tile.paste(image, ((size_hw[1] - width) // 2, (size_hw[0] - height) // 2))
    return draw_grid([tile, draw_text(lines, size_hw[1])], num_columns=1, gap=0) if lines else tile


def draw_boxes(
    image: Image.Image,
    boxes: NDArray,
    colours: Sequence[str],
    labels: Sequence[str] = (),
    *,
    letter_size: float = LETTER_SIZE,
) -> None:
    """Draw boxes and labels into an image; their lines and letters grow with it.

    Args:
        boxes: (N, 4) xyxy in pixels of the image; later ones cover earlier ones.
        colours: of the N boxes, such as `#0072B2`.
        labels: of the N boxes, or of none. An empty label is not drawn, and neither is one that finds no free place at
            its box; the last boxes come first.
        letter_size: height of the labels, as a share of the side of a square of the image's area; 11 pixels at least.
    """
    draw = ImageDraw.Draw(image)
    side = math.sqrt(image.width * image.height)
    size, line = max(11, round(letter_size * side)), max(2, round(LETTER_SIZE * side / 6))
    # Thin boxes get room for the line inside of the rim: 3, as 2 is not enough where floats are rounded.
    outlines: list[Rectangle] = [(x1, y1, max(x2, x1 + 3), max(y2, y1 + 3)) for x1, y1, x2, y2 in boxes.tolist()]
    for (x1, y1, x2, y2), colour in zip(outlines, colours, strict=True):
        draw.rectangle((x1, y1, x2, y2), outline="black", width=line + 2)  # a rim: visible on every background
        draw.rectangle((x1 + 1, y1 + 1, x2 - 1, y2 - 1), outline=colour, width=line)
    tags: list[tuple[Rectangle, str, ImageFont.FreeTypeFont, str]] = []
    for outline, colour, label in reversed(list(zip(outlines, colours, labels, strict=bool(labels)))):
        if label:
            font, text = _set(label, size)
            tag_size = (font.getlength(text) + size * 0.6, size * 1.4)
            place = place_tag(outline, tag_size, image.size, [tag for tag, *_ in tags])
            if place is not None:
                tags.append((place, text, font, colour))
    for tag, text, font, colour in reversed(tags):
        draw.rectangle(tag, fill=colour)
        draw.text(((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2), text, fill=_ink_on(colour), font=font, anchor="mm")


def corners_of(entries: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Return the (N, 4) xyxy boxes of COCO entries, whose `bbox` is xywh."""
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (entry["bbox"] for entry in entries)]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def place_tag(
    box: Rectangle, tag_size: tuple[float, float], image_size: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle | None:
    """Return a place for a tag that covers no other tag, or None.

    It lies above its box, else inside, else below, first at the left and last at the right; at last inside of the box
    in lines of its own.

    Args:
        tag_size, image_size: width and height.
        taken: places of other tags.
    """
    (width, height), (x1, y1, x2, y2) = tag_size, box
    tops = [y1 - height, y1, y2 - height, y2]
    tops += [y1 + line * height for line in range(1, int((y2 - y1) / height) - 1)]
    for top in tops:
        # The image may be smaller than its tag.
        if not (0 <= top <= image_size[1] - height or image_size[1] < height):
            continue
        y = max(top, 0.0) if image_size[1] >= height else 0.0
        for left in (x1, x2 - width, (x1 + x2 - width) / 2):
            x = max(min(left, image_size[0] - width), 0)
            if all(x + width <= a or c <= x or y + height <= b or d <= y for a, b, c, d in taken):
                return x, y, x + width, y + height
    return None


def draw_text(lines: Sequence[str], width: int) -> Image.Image:
    """Return lines of text on white; a line that is too long loses its beginning, as the ends of file names differ."""
    strip = Image.new("RGB", (width, LINE_HEIGHT * len(lines)), "white")
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        font, text = _set(line, _TEXT_SIZE)
        while font.getlength(text) > width - 8 and len(text) > 1:
            text = "\u2026" + text[2:]
        draw.text((4, (number + 0.5) * LINE_HEIGHT), text, fill=_INK, font=font, anchor="lm")
    return strip


def draw_grid(tiles: Sequence[Image.Image], num_columns: int, gap: int = 6) -> Image.Image:
    """Return tiles in rows, on white; columns and rows are as large as their largest tile."""
    num_columns = min(num_columns, len(tiles))
    widths = [max(tile.width for tile in tiles[column::num_columns]) for column in range(num_columns)]
    rows = [tiles[start : start + num_columns] for start in range(0, len(tiles), num_columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    grid = Image.new("RGB", (sum(widths) + gap * (num_columns - 1), sum(heights) + gap * (len(rows) - 1)), "white")
    for row, tiles_of_row in enumerate(rows):
        for column, tile in enumerate(tiles_of_row):
            grid.paste(tile, (sum(widths[:column]) + gap * column, sum(heights[:row]) + gap * row))
    return grid


def save_picture(image: Image.Image, file: Path) -> None:
    """Write a picture at once (never half of it), as JPEG or PNG after its name."""
    buffer = io.BytesIO()
    kind = "PNG" if file.suffix == ".png" else "JPEG"
    image.save(buffer, format=kind, quality=90, subsampling=0)  # thin lines keep their colours at full resolution only
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, buffer.getvalue())


def _ink_on(colour: str) -> str:
    """Return black or white, whichever can be read on the colour."""
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 100 else "white"


def _set(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """Return a font for a text, and the text as the font can show it."""
    file, shown = set_text(text)
    return font_of(file, size), shown
