"""SoCo's proposal filters: minimum side, aspect ratio, maximum size, then greedy NMS. Free of torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.compiling import compiled


@dataclass(frozen=True)
class FilterRules:
    """Limits for proposals.

    Attributes:
        min_size: least width and height in pixels.
        max_ratio: width / height must be in [1 / max_ratio, max_ratio].
        max_size: greatest sqrt(box area) / sqrt(image area).
        nms: a box is left out if its IoU with an earlier, kept box is greater than this; 1 keeps all.
        max_per_image: number of boxes kept at most, best first; None keeps all.
    """

    min_size: float
    max_ratio: float
    max_size: float
    nms: float
    max_per_image: int | None = None


def filter_proposals(boxes: NDArray[np.float32], size_hw: tuple[int, int], rules: FilterRules) -> NDArray[np.float32]:
    """Return the boxes that pass the rules, (M, 4) of (N, 4) float32 xyxy in pixels, in the given order (best first).

    If no box passes, the rules are relaxed as in SoCo: first the size rules are dropped, then the ratio rule.

    Source: paper §3.2 and D.1 (`ratio3size0008@0.5`); the thresholds are part of the allowed range.
    """
    valid = boxes[is_valid(boxes)]
    good_ratio = has_allowed_ratio(valid, rules.max_ratio)
    good = good_ratio & has_allowed_size(valid, size_hw, rules.min_size, rules.max_size)
    if good.any():
        kept = valid[good]
    elif good_ratio.any():
        kept = valid[good_ratio]
    else:
        kept = valid
    return kept[nms(kept, rules.nms)][: rules.max_per_image]


def is_valid(boxes: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return (N,) bool for (N, 4) xyxy boxes: True if finite, with a width and a height."""
    return np.asarray(np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1), dtype=bool)


def clip_to_image(boxes: NDArray[np.float32], size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Cut boxes, (N, 4) float32 xyxy in pixels, at the border of the image; leave out those outside or not finite."""
    finite = boxes[np.isfinite(boxes).all(axis=1)]
    limits = np.array([size_hw[1], size_hw[0]] * 2, dtype=np.float32)
    clipped = np.clip(finite, 0, limits).astype(np.float32)
    return clipped[is_valid(clipped)]


def has_allowed_ratio(boxes: NDArray[np.float32], max_ratio: float) -> NDArray[np.bool_]:
    """Return (N,) bool for (N, 4) xyxy boxes: True if neither side is more than `max_ratio` times the other."""
    width, height = _sides(boxes)
    return (width <= max_ratio * height) & (height <= max_ratio * width)


def has_allowed_size(
    boxes: NDArray[np.float32], size_hw: tuple[int, int], min_size: float, max_size: float
) -> NDArray[np.bool_]:
    """Return (N,) bool for (N, 4) xyxy boxes: True if large enough and not too large, see `FilterRules`."""
    width, height = _sides(boxes)
    relative = np.sqrt(width * height) / np.sqrt(float(size_hw[0]) * size_hw[1])
    return (width >= min_size) & (height >= min_size) & (relative <= max_size)


@compiled
def nms(boxes: NDArray[np.float32], threshold: float) -> NDArray[np.int64]:
    """Return the (M,) ascending positions of the boxes, (N, 4) xyxy, best first, that greedy NMS keeps.

    A box is left out if its IoU with an earlier, kept box is greater than the threshold.
    """
    boxes = boxes.astype(np.float64)
    kept = np.empty(len(boxes), dtype=np.int64)
    num_kept = 0
    for row in range(len(boxes)):
        x1, y1, x2, y2 = boxes[row]
        is_kept = True
        for earlier in kept[:num_kept]:
            width = min(x2, boxes[earlier, 2]) - max(x1, boxes[earlier, 0])
            height = min(y2, boxes[earlier, 3]) - max(y1, boxes[earlier, 1])
            if width > 0 and height > 0:
                shared = width * height
                area = (boxes[earlier, 2] - boxes[earlier, 0]) * (boxes[earlier, 3] - boxes[earlier, 1])
                if shared / ((x2 - x1) * (y2 - y1) + area - shared) > threshold:
                    is_kept = False
                    break
        if is_kept:
            kept[num_kept] = row
            num_kept += 1
    return kept[:num_kept]


def pairwise_iou(boxes: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the (N, M) IoU of all pairs of (N, 4) and (M, 4) xyxy boxes; 0 where both are empty."""
    intersection = pairwise_intersection(boxes, others)
    union = areas_of(boxes)[:, None] + areas_of(others)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def pairwise_intersection(boxes: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the (N, M) shared areas in square pixels of all pairs of (N, 4) and (M, 4) xyxy boxes."""
    first, second = boxes.astype(np.float64), others.astype(np.float64)
    # One axis at a time, to save memory.
    width = np.minimum(first[:, None, 2], second[None, :, 2]) - np.maximum(first[:, None, 0], second[None, :, 0])
    height = np.minimum(first[:, None, 3], second[None, :, 3]) - np.maximum(first[:, None, 1], second[None, :, 1])
    return np.asarray(np.clip(width, 0, None) * np.clip(height, 0, None))


def areas_of(boxes: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the (N,) areas of (N, 4) xyxy boxes in square pixels."""
    width, height = _sides(boxes)
    return width * height


def _sides(boxes: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    return sides[:, 0], sides[:, 1]
