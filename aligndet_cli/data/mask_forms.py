"""Checks of COCO segmentations without drawing them: what a file may hold, and the images that it fits."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.images import MAX_PIXELS
from aligndet_cli.errors import DataError

_MIN_COORDINATES = 6  # three corners; pycocotools takes four numbers for a box
_HUGE = 1e18  # beyond it, whole numbers may not be numbers of C
_FARTHEST = 10  # coordinates by the longer side of the image: beyond it is no clipped object but a mistake


class Form(NamedTuple):
    """A segmentation that can be drawn on an image that it fits.

    Attributes:
        content: polygons as lists of x, y, ..., each of three corners or more, or a run-length code.
        reach: largest absolute coordinate of polygons in pixels; 0 for a code.
        code_hw: height and width of a code; (0, 0) for polygons.
    """

    content: Any
    reach: float
    code_hw: tuple[int, int]


def form_of(segmentation: Any) -> Form:
    """Return a checked segmentation. Polygons of fewer corners are left out; a flat list of numbers is one polygon.

    Raises:
        DataError: neither polygons nor a run-length code, or nothing is left of it.
    """
    if isinstance(segmentation, list) and (reach := _reach_of_sound(segmentation)) is not None:
        return Form(segmentation, reach, (0, 0))
    try:
        if isinstance(segmentation, dict):
            return Form(segmentation, 0.0, _checked_size(segmentation))
        if not isinstance(segmentation, list | tuple):
            raise TypeError(f"{segmentation!r:.40} is no list")
        is_flat = bool(segmentation) and isinstance(segmentation[0], int | float)
        polygons = [_checked_polygon(polygon) for polygon in ([segmentation] if is_flat else segmentation)]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"a mask is neither polygons nor a run-length code ({error})") from None
    usable = [(polygon, reach) for polygon, reach in polygons if polygon]
    if not usable:
        raise DataError("a mask has no polygon of three corners")
    return Form([polygon for polygon, _ in usable], max(reach for _, reach in usable), (0, 0))


def misfit(reach: float, code_hw: tuple[int, int], size_hw: tuple[int, int]) -> str:
    """Return the reason why a mask of that form cannot be drawn on an image of that size; "" if it can."""
    if size_hw[0] * size_hw[1] > MAX_PIXELS:
        return f"a mask is of an image of {size_hw[1]}x{size_hw[0]} pixels, which cannot be read"
    if any(code_hw) and code_hw != size_hw:
        return f"a mask is {list(code_hw)} (height, width) but its image {list(size_hw)}"
    if reach > _FARTHEST * max(size_hw):
        return f"a mask has the coordinate {reach:g}, far from its image of {size_hw[1]}x{size_hw[0]}"
    return ""


def are_misfits(
    reach: NDArray[np.float64], code_hw: NDArray[np.int64], sizes_hw: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Return True (N,) for masks that `misfit` refuses, by their forms and images; unknown sizes (0) fit."""
    is_other = code_hw.any(axis=1) & (code_hw != sizes_hw).any(axis=1)
    is_far = ~(reach <= _FARTHEST * sizes_hw.max(axis=1, initial=0))
    return np.isinf(reach) | ((is_other | is_far) & (sizes_hw[:, 0] > 0))


def _reach_of_sound(polygons: list[Any]) -> float | None:
    """Return the largest absolute coordinate of polygons with nothing to correct, which nearly all have; else None."""
    reach = 0.0
    for polygon in polygons:
        if type(polygon) is not list or len(polygon) < _MIN_COORDINATES or len(polygon) % 2:
            return None
        try:
            top, low, total = max(polygon), min(polygon), sum(polygon)
            if total - total != 0:  # NaN or infinite
                return None
        except TypeError:
            return None
        reach = max(reach, top, -low)
    return float(reach) if polygons and reach < _HUGE else None


def _checked_polygon(polygon: Any) -> tuple[list[float], float]:
    """Return a polygon, empty if it has too few corners, and its largest absolute coordinate."""
    if not isinstance(polygon, list | tuple):
        raise TypeError(f"{polygon!r:.40} is no list of coordinates")
    if len(polygon) < _MIN_COORDINATES or len(polygon) % 2:
        return [], 0.0
    try:
        total = sum(polygon)
    except TypeError:
        polygon = [float(value) for value in polygon]
        total = sum(polygon)
    if not math.isfinite(total):
        raise ValueError(f"the sum of its coordinates is {total}")
    return list(polygon), max(max(polygon), -min(polygon))


def _checked_size(code: dict[str, Any]) -> tuple[int, int]:
    """Return height and width of a run-length code whose runs make up an image of that size."""
    height, width = code["size"]
    if type(height) is not int or type(width) is not int or not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"its size is {code['size']!r:.40}")
    counts = code["counts"]
    runs = np.array(counts, dtype=np.int64) if isinstance(counts, list) else runs_of(counts)
    if runs.ndim != 1 or (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(f"its runs are of {int(runs.sum())} pixels, its size of {height * width}")
    return height, width


def runs_of(text: str | bytes) -> NDArray[np.int64]:
    """Return the runs (R,) of a compressed code.

    Source: cocoapi's maskApi.c: 5 bits a letter, and a sixth where more follow; from the fourth run on, differences to
    the last run but one.
    """
    if not isinstance(text, str | bytes):
        raise TypeError(f"{text!r:.40} is no text")
    letters = np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, dtype=np.uint8)
    bits = letters.astype(np.int64) - 48
    if not len(bits):
        return bits
    is_last = (bits & 32) == 0
    if not is_last[-1] or (bits < 0).any() or (bits > 63).any():
        raise ValueError("its text is no run-length code")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:
        raise ValueError("its text holds a run of more than 40 bits")
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, lengths))
    values = np.add.reduceat((bits & 31) << shifts, starts)
    values -= np.where(bits[ends] & 16, 1 << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
