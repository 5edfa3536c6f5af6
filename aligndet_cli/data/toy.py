"""A small data set drawn from a seed: textured shapes on cluttered backgrounds, in COCO format.

Classes differ by outline and by texture, never by colour. The set is awkward on purpose, in small ways: no two
sides need be equal, objects overlap and touch the border, and one image of each split has no object at all.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from aligndet_cli.errors import RunError
from aligndet_cli.files import write_bytes

Pixels = NDArray[np.float32]

# COCO-like ids with gaps, so that a class id taken for a category id cannot go unnoticed.
CATEGORIES = {2: "disc", 3: "square", 5: "triangle", 7: "star", 11: "cross"}

_MAX_OBJECTS = 6
_ATTEMPTS_PER_OBJECT = 8
_SIDE_RANGE = (0.17, 0.6)  # of the shorter image side; log-uniform, median some 55 px of 180
_SINGLE_SIDE_RANGE = (0.9, 1.15)  # the same for the single object of an object-centric image
_MIN_VISIBLE = 0.5  # of the area of an object; with less, its outline would not tell its class
_MIN_PART = 0.1  # of the visible area of an object; smaller separate pieces do not count
_SIZE_JITTER = 0.12
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class _Object:
    """A placed object: its outline (P, 2) x, y in pixels, its class by category id, and its colours."""

    category_id: int
    outline: NDArray[np.float64]
    center: tuple[float, float]
    side: float
    angle: float
    colors: tuple[Pixels, Pixels]


def draw_toy_data(
    folder: Path, *, seed: int, num_train: int, num_val: int, size_hw: tuple[int, int] = (176, 208)
) -> None:
    """Draw the data set into `folder`: `train/`, `val/` and `annotations/instances_{train,val}.json`.

    The same arguments give the same bytes; every image has a generator of its own, so that image 5 does not
    depend on how many there are. Each image differs from the typical height and width by up to 12 % on either side.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        for number, (split, num_images) in enumerate((("train", num_train), ("val", num_val))):
            (folder / split).mkdir(parents=True, exist_ok=True)
            _draw_split(folder, split, num_images, (seed, number), size_hw)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from None


def draw_toy_objects(
    folder: Path, *, seed: int, num_train: int, num_val: int, size_hw: tuple[int, int] = (88, 104)
) -> None:
    """Draw object-centric images of the same classes, one folder per class: `train/disc/000000.jpg` and so on.

    Each image has one object, at an angle, size and place of its own, on a cluttered background. Classes take turns;
    `num_train` and `num_val` count the images of all. Sizes vary as those of `draw_toy_data`.

    Raises:
        RunError: the folder cannot be written.
    """
    names = list(CATEGORIES.items())
    try:
        for number, (split, num_images) in enumerate((("train", num_train), ("val", num_val))):
            for index in range(num_images):
                category_id, name = names[index % len(names)]
                # Numbers 2 and 3 give other random streams than the scenes of the same seed.
                rng = np.random.default_rng([seed, 2 + number, index])
                place = folder / split / name
                place.mkdir(parents=True, exist_ok=True)
                _write_jpeg(place / f"{index:06d}.jpg", draw_toy_object(rng, size_hw, category_id))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from None


def draw_toy_object(rng: np.random.Generator, size_hw: tuple[int, int], category_id: int) -> NDArray[np.uint8]:
    """Draw an image (H, W, 3) uint8 RGB of one object of a class."""
    height, width = _jittered(rng, size_hw)
    canvas = _background(rng, height, width)
    item = _random_object(rng, height, width, [category_id], _SINGLE_SIDE_RANGE)
    mask = _fill(item.outline, (height, width))
    canvas[mask] = _textured(item, mask)
    return _photographed(rng, canvas)


def _write_jpeg(file: Path, pixels: NDArray[np.uint8]) -> None:
    _, encoded = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    # Without fsync, which would dominate.
    file.write_bytes(encoded.tobytes())


def _draw_split(folder: Path, split: str, num_images: int, seed: tuple[int, int], size_hw: tuple[int, int]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_images):
        rng = np.random.default_rng([*seed, index])
        # Image 3 stays empty, so that in a set of three images all have objects.
        pixels, objects = draw_toy_image(rng, size_hw, max_objects=0 if index == 3 else _MAX_OBJECTS)
        file_name = f"{index:06d}.jpg"
        image_id = 100_000 * seed[1] + 10 * index + 7  # not a position, as in COCO
        _write_jpeg(folder / split / file_name, pixels)  # the json is written last: it shows that all are there
        height, width = pixels.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    categories = [{"id": category_id, "name": name} for category_id, name in CATEGORIES.items()]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(exist_ok=True)
    write_bytes(folder / "annotations" / f"instances_{split}.json", json.dumps(content).encode())


def draw_toy_image(
    rng: np.random.Generator, size_hw: tuple[int, int], *, max_objects: int
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Draw an image (H, W, 3) uint8 RGB; return it and its objects as COCO annotations without ids (boxes xywh)."""
    height, width = _jittered(rng, size_hw)
    canvas = _background(rng, height, width)
    owner = np.zeros((height, width), dtype=np.int16)  # number of the object seen at each pixel, 0 background
    placed: list[_Object] = []
    for _ in range(int(rng.integers(1, max_objects + 1)) if max_objects else 0):
        for _ in range(_ATTEMPTS_PER_OBJECT):
            item = _random_object(rng, height, width, list(CATEGORIES), _SIDE_RANGE)
            mask = _fill(item.outline, (height, width))
            if _may_cover(owner, mask, item):
                placed.append(item)
                owner[mask] = len(placed)
                canvas[mask] = _textured(item, mask)
                break
    pixels = _photographed(rng, canvas)
    return pixels, [_annotation(item, owner == number) for number, item in enumerate(placed, start=1)]


def _jittered(rng: np.random.Generator, size_hw: tuple[int, int]) -> tuple[int, int]:
    height, width = (round(side * rng.uniform(1 - _SIZE_JITTER, 1 + _SIZE_JITTER)) for side in size_hw)
    return height, width


def _photographed(rng: np.random.Generator, canvas: Pixels) -> NDArray[np.uint8]:
    """Return the canvas (H, W, 3) with soft edges, and with noise so that no area is perfectly flat."""
    noise = rng.normal(0, 4, canvas.shape)
    return np.clip(cv2.GaussianBlur(canvas, (3, 3), 0.6) + noise, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Draw (H, W, 3) float32: two octaves of smooth colour, with untextured slabs and lines as clutter."""
    canvas = np.full((height, width, 3), rng.uniform(70, 180, 3), dtype=np.float32)
    for cells, amplitude in ((3, 38), (9, 14)):
        noise = rng.normal(0, amplitude, (cells, cells, 3)).astype(np.float32)
        canvas += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(int(rng.integers(5, 11))):
        center = rng.uniform(0, 1, 2) * (width, height)
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 6))))
        radii = rng.uniform(5, 0.16 * min(height, width), len(angles))
        outline = center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        color = rng.uniform(40, 215, 3)
        cv2.fillPoly(canvas, [np.round(outline).astype(np.int32)], color.tolist(), lineType=cv2.LINE_AA)
    for _ in range(int(rng.integers(3, 7))):
        ends = np.round(rng.uniform(0, 1, (2, 2)) * (width, height)).astype(int)
        color = rng.uniform(30, 225, 3).tolist()
        cv2.line(canvas, ends[0].tolist(), ends[1].tolist(), color, int(rng.integers(1, 3)), cv2.LINE_AA)
    return canvas


def _random_object(
    rng: np.random.Generator, height: int, width: int, category_ids: list[int], side_range: tuple[float, float]
) -> _Object:
    """Draw an object of one of the classes; `side_range` is relative to the shorter image side."""
    category_id = int(rng.choice(category_ids))
    low, high = np.log(side_range)
    side = float(np.exp(rng.uniform(low, high))) * min(height, width)
    angle = float(rng.uniform(0, 2 * np.pi))
    # Centres come close enough to the border for about one object in five to be cut by it.
    center = tuple(rng.uniform(0.35 * side, limit - 0.35 * side) for limit in (width, height))
    outline = _OUTLINES[category_id]() * (side / 2) * rng.uniform(0.8, 1.0, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    base = rng.uniform(45, 210, 3).astype(np.float32)
    contrast = rng.choice([-1, 1]) * rng.uniform(38, 70) * rng.uniform(0.7, 1.0, 3)
    colors = (base, np.clip(base + contrast, 0, 255).astype(np.float32))
    return _Object(category_id, outline @ turn.T + center, (center[0], center[1]), side, angle, colors)


def _regular(num_corners: int, radii: tuple[float, ...] = (1.0,)) -> NDArray[np.float64]:
    """Return corners (P, 2) on the unit circle; several radii alternate."""
    angles = np.arange(num_corners) * (2 * np.pi / num_corners)
    radius = np.resize(np.array(radii), num_corners)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _cross() -> NDArray[np.float64]:
    arm, end = 0.34, 1.0
    quarter = np.array([[end, -arm], [end, arm], [arm, arm]])
    turns = [np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), power) for power in range(4)]
    return np.concatenate([quarter @ turn.T for turn in turns])


_OUTLINES: dict[int, Callable[[], NDArray[np.float64]]] = {
    2: lambda: _regular(32),
    3: lambda: _regular(4),
    5: lambda: _regular(3),
    7: lambda: _regular(10, (1.0, 0.5)),
    11: _cross,
}


def _fill(outline: NDArray[np.float64], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(size_hw, dtype=np.uint8)
    cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)
    return mask.astype(np.bool_)


def _may_cover(owner: NDArray[np.int16], mask: NDArray[np.bool_], item: _Object) -> bool:
    """Return True if the object is large enough inside the image and leaves the objects below it visible."""
    x, y = item.outline.T
    full_area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))  # shoelace formula
    if mask.sum() < _MIN_VISIBLE * full_area:
        return False
    # An object may already be partly hidden: two thirds of its visible part must stay.
    before = np.bincount(owner.ravel())
    hidden = np.bincount(owner[mask], minlength=len(before))
    return bool((hidden[1:] <= before[1:] / 3).all())


def _textured(item: _Object, mask: NDArray[np.bool_]) -> Pixels:
    """Return colours (P, 3) of the object's pixels in a mask (H, W); the texture turns and scales with the object."""
    y, x = np.nonzero(mask)
    cos, sin = np.cos(item.angle), np.sin(item.angle)
    dx, dy = x - item.center[0], y - item.center[1]
    scale = 2 / item.side
    u, v = (cos * dx + sin * dy) * scale, (cos * dy - sin * dx) * scale  # (P,) each, -1..1 within the outline
    weight = np.clip(0.5 + 2 * _TEXTURES[item.category_id](u, v), 0, 1)[:, None].astype(np.float32)
    return item.colors[0] * (1 - weight) + item.colors[1] * weight


_TEXTURES: dict[int, Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]] = {
    2: lambda u, v: np.sin(14 * np.hypot(u, v)),  # rings
    3: lambda u, v: np.sin(9 * (u + v)) * np.sin(9 * (u - v)),  # checks, along the sides
    5: lambda u, v: np.sin(16 * v),  # stripes
    7: lambda u, v: np.cos(13 * u) + np.cos(13 * v) - 0.8,  # dots
    11: lambda u, v: np.sin(8 * np.arctan2(v, u)),  # wedges
}


def _annotation(item: _Object, visible: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the COCO annotation of the visible part of an object: box, pixel area, and a polygon per piece."""
    # Slivers between other objects would stretch the box to places where nothing can be recognised.
    _, parts, stats, _ = cv2.connectedComponentsWithStats(visible.astype(np.uint8))
    is_part = stats[:, cv2.CC_STAT_AREA] >= _MIN_PART * visible.sum()
    is_part[0] = False  # the background of `visible`
    kept = is_part[parts]  # (H, W)
    y, x = np.nonzero(kept)
    contours, _ = cv2.findContours(kept.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [contour.ravel().tolist() for contour in contours if len(contour) >= 3]
    left, top = int(x.min()), int(y.min())
    return {
        "category_id": item.category_id,
        "bbox": [left, top, int(x.max()) - left + 1, int(y.max()) - top + 1],
        "area": len(x),
        "iscrowd": 0,
        "segmentation": polygons,
    }
