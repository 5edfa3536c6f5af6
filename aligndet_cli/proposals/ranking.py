"""Order of the boxes of a search: the most promising first, for every number of boxes that may be kept."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from aligndet_cli.compiling import Floats, compiled
from aligndet_cli.proposals.grouping import Groups

_SAME = 0.7  # least IoU of two boxes that count as the same find
_RING = 0.1  # width of the ring around a box that is looked at, as a share of its sides

# Weights of the cues: between a logistic regression on photos of COCO, and one on COCO and blood cells together.
# tests/benchmarks/proposal_order.py fits them; examples/benchmarks.md has the results on other data.
WEIGHTS = {
    "area": 0.25,  # its logarithm
    "agreement": 0.9,  # logarithm of how often the box, or almost the same, was found
    "fill": 2.0,  # share of the box that the region covers
    "contrast": 4.5,  # to the most similar neighbour
    "surroundings": -4.5,  # edge strength around the box, high if its border cuts through an object
    "sides": -0.3,  # number of its sides on which the image ends
}


def ranked(found: Sequence[Groups], strength: Floats) -> Floats:
    """Return the distinct boxes, (N, 4) float32 xyxy, most promising first, equal ones by coordinates.

    Args:
        strength: (H, W) float32 edge strength, 0..1.
    """
    boxes, cues = describe_boxes(found, strength)
    promise = np.sum([weight * cues[name] for name, weight in WEIGHTS.items()], axis=0, dtype=np.float64)
    promise -= np.arange(len(boxes)) * 1e-9  # orders equal boxes; a stable sort takes six times as long
    return boxes[np.argsort(-promise)]


def describe_boxes(found: Sequence[Groups], strength: Floats) -> tuple[Floats, dict[str, Floats]]:
    """Return the distinct boxes, (N, 4) float32 xyxy by coordinates, and the (N,) float32 cues in `WEIGHTS` by name.

    If a box was found several times, its greatest fill and contrast count. Arguments as in `ranked`.
    """
    boxes, fills, contrasts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    keys = box_keys(boxes)
    order = np.argsort(keys)
    starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
    times = np.diff(starts, append=len(order)).astype(np.int32)
    boxes = boxes[order[starts]]
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.T)
    areas = (x2 - x1) * (y2 - y1)
    by_area = np.argsort(areas)
    similar = np.empty_like(areas)
    similar[by_area] = num_similar(x1[by_area], y1[by_area], x2[by_area], y2[by_area], times[by_area], _SAME)
    integral = np.asarray(cv2.integral(strength), dtype=np.float64)
    surroundings, sides = look_around(boxes, integral, _RING)
    return boxes, {
        "area": np.log(areas),
        "agreement": np.log(similar),
        "fill": np.maximum.reduceat(fills[order], starts),
        "contrast": np.maximum.reduceat(contrasts[order], starts),
        "surroundings": surroundings,
        "sides": sides,
    }


def box_keys(boxes: Floats) -> NDArray[np.uint64]:
    """Return (N,) numbers that sort like (N, 4) boxes, ten times as fast; coordinates must be below 2**16."""
    x1, y1, x2, y2 = boxes.T.astype(np.uint64)
    return np.asarray(x1 | y1 << np.uint64(16) | x2 << np.uint64(32) | y2 << np.uint64(48))


@compiled
def look_around(boxes: Floats, integral: NDArray[np.float64], ring: float) -> tuple[Floats, Floats]:
    """Return (N,) mean edge strength in a ring around each box, and (N,) number of its sides at the image's border.

    Args:
        boxes: (N, 4) xyxy, whole pixels of the image.
        integral: (H + 1, W + 1) sums of the edge strength above and left of each corner of a pixel.
        ring: width of the ring, as a share of the box's sides. The strength is 0 if the ring is outside the image.
    """
    height, width = integral.shape[0] - 1, integral.shape[1] - 1
    strength, sides = np.zeros(len(boxes), dtype=np.float32), np.zeros(len(boxes), dtype=np.float32)
    for number in range(len(boxes)):
        x1, y1, x2, y2 = int(boxes[number, 0]), int(boxes[number, 1]), int(boxes[number, 2]), int(boxes[number, 3])
        right, down = round(ring * (x2 - x1)), round(ring * (y2 - y1))
        left, top = max(x1 - right, 0), max(y1 - down, 0)
        right, down = min(x2 + right, width), min(y2 + down, height)
        area = (right - left) * (down - top) - (x2 - x1) * (y2 - y1)
        if area > 0:
            whole = integral[down, right] - integral[top, right] - integral[down, left] + integral[top, left]
            inside = integral[y2, x2] - integral[y1, x2] - integral[y2, x1] + integral[y1, x1]
            strength[number] = (whole - inside) / area
        sides[number] = (x1 <= 1) + (y1 <= 1) + (x2 >= width - 1) + (y2 >= height - 1)
    return strength, sides


@compiled
def num_similar(
    x1: Floats, y1: Floats, x2: Floats, y2: Floats, times: NDArray[np.int32], threshold: float
) -> NDArray[np.int32]:
    """Return (N,) int32 how often a box with an IoU of at least the threshold was found, the box itself included.

    One array per coordinate, cut to the candidates, and no branches: the inner loop then compares eight boxes at a
    time, six times as fast.

    Args:
        x1, y1, x2, y2: (N,) float32 sides of the boxes, by rising area.
        times: (N,) int32 how often each was found.
    """
    areas = (x2 - x1) * (y2 - y1)
    starts = np.searchsorted(areas, areas * threshold)  # IoU is at most the ratio of the areas
    ends = np.searchsorted(areas, areas / threshold, side="right")
    least = np.float32(threshold / (1 + threshold))  # of the sum of the areas
    similar = np.empty_like(times)
    for i in range(len(areas)):
        near = slice(starts[i], ends[i])
        left, top, right, bottom = x1[near], y1[near], x2[near], y2[near]
        near_areas, near_times = areas[near], times[near]
        total = np.int32(0)
        for j in range(len(left)):
            width = max(min(x2[i], right[j]) - max(x1[i], left[j]), np.float32(0))
            height = max(min(y2[i], bottom[j]) - max(y1[i], top[j]), np.float32(0))
            is_same = width * height >= least * (areas[i] + near_areas[j])
            total += near_times[j] if is_same else np.int32(0)
        similar[i] = total
    return similar
