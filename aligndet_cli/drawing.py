r"""Pictures made of tiles: images with boxes and labels, and lines of text.

Text is set in DejaVu Sans, which comes with Matplotlib and has Latin, Greek, Cyrillic and Arabic letters, among others.
A text with other letters, such as Chinese ones, is set in an installed font that has them. Letters that no font has are
written as their numbers, as in `\u732b`.
"""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from aligndet_cli.files import write_bytes

LINE_HEIGHT = 24  # pixels, of a line of text
_TEXT_SIZE, _INK, _BEHIND_IMAGES = 13, "#1e1e1e", "#e8e8e8"
_LONGEST_NUMBERS = 24  # letters of a text in which numbers stand for some
_FONT_FILE = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")

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


def draw_boxes(image: Image.Image, boxes: NDArray, colours: Sequence[str], labels: Sequence[str] = ()) -> None:
    """Draw boxes and labels into an image; their lines and letters grow with it.

    Args:
        boxes: (N, 4) xyxy in pixels of the image; later ones cover earlier ones.
        colours: of the N boxes, such as `#0072B2`.
        labels: of the N boxes, or of none; an empty label is not drawn.
    """
    draw = ImageDraw.Draw(image)
    size = max(11, round(0.022 * math.sqrt(image.width * image.height)))
    line = max(2, size // 6)
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
            tags.append((place_tag(outline, tag_size, image.size, [tag for tag, *_ in tags]), text, font, colour))
    for tag, text, font, colour in reversed(tags):
        draw.rectangle(tag, fill=colour)
        draw.text(((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2), text, fill=_ink_on(colour), font=font, anchor="mm")


def corners_of(entries: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Return the (N, 4) xyxy boxes of COCO entries, whose `bbox` is xywh."""
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (entry["bbox"] for entry in entries)]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def place_tag(
    box: Rectangle, tag_size: tuple[float, float], image_size: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Return the place of a tag: above its box, else inside, else below, and not over another tag if possible.

    Args:
        tag_size, image_size: width and height.
        taken: places of other tags.
    """
    width, height = tag_size
    x = max(min(box[0], image_size[0] - width), 0)
    tops = [box[1] - height, box[1], box[3] - height, box[3]]
    places = [(x, top, x + width, top + height) for top in tops if 0 <= top <= image_size[1] - height]
    for x1, y1, x2, y2 in places:
        if all(x2 <= left or right <= x1 or y2 <= top or bottom <= y1 for left, top, right, bottom in taken):
            return x1, y1, x2, y2
    return places[0] if places else (x, 0.0, x + width, height)  # the image may be smaller than its tag


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
    """Return a font for a text, and the text with numbers in place of letters that the font lacks."""
    missing = frozenset(text) - _letters_of(_FONT_FILE)
    file = _installed_font(missing) if missing else _FONT_FILE
    known = _letters_of(file)
    shown = "".join(letter if letter in known else ascii(letter)[1:-1] for letter in text)
    longest = max(len(text), _LONGEST_NUMBERS)
    return _font(file, size), shown if len(shown) <= longest else f"{shown[: longest - 11]}\u2026{shown[-10:]}"


@cache
def _installed_font(letters: frozenset[str]) -> str:
    """Return the first font of this machine that has these letters and Latin ones, or our own where none has."""
    wanted = letters | {chr(code) for code in range(32, 127)}
    # "Last Resort", which comes with Matplotlib, draws every letter as an empty box.
    for file in sorted({entry.fname for entry in fontManager.ttflist if not entry.name.startswith("Last Resort")}):
        with contextlib.suppress(OSError, RuntimeError):  # it has gone, or cannot be read
            if wanted <= _letters_of(file) and _font(file, 12):
                return file
    return _FONT_FILE


@lru_cache(maxsize=8)  # Chinese fonts are large
def _letters_of(file: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(file).get_charmap()))


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
