"""Recall of the labelled objects, by the number of proposals looked at and by object size."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.data.dataset import ImageSet, positions_of
from aligndet_cli.proposals.filters import has_allowed_size, pairwise_iou

BUDGETS = (1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 70, 100, 140, 200, 300, 500, 700, 1000)
_SHOWN = ("50", "100", "300", "all")
_SIZE_LIMITS = (32.0**2, 96.0**2)  # COCO's small / medium / large, in square pixels


def measure_recall(store: ProposalStore, image_set: ImageSet, min_size: float) -> dict[str, Any]:
    """Return recall at IoU 0.5 and best overlap (ABO of Uijlings 2013, over objects instead of classes), as JSON.

    Crowds, and objects in images that are not in the store, are left out. Memory does not grow with the number of
    proposals or objects.

    Args:
        min_size: objects with both sides of at least this many pixels form a group, `reach_min_size`; smaller objects
            cannot be proposed.

    Returns:
        `{"budgets": [1, 2, 3, 5, ... 1000, "all"]}`, and for each group of objects their number, the values for the
        first 50, 100, 300 and all proposals of an image, and `curve` with the values for all budgets.
    """
    names = ("all", "small", "medium", "large", "reach_min_size")
    num_objects = np.zeros(len(names), dtype=np.int64)
    num_found = np.zeros((len(names), len(BUDGETS) + 1))
    sum_overlap = np.zeros((len(names), len(BUDGETS) + 1))
    for position, place in enumerate(positions_of(image_set.image_ids, store.image_ids).tolist()):
        start, stop = image_set.offsets[position : position + 2]
        objects = start + np.flatnonzero(~image_set.is_crowd[start:stop])
        if not len(objects) or place < 0:
            continue
        boxes, areas = image_set.boxes[objects], image_set.areas[objects]
        groups = _groups(boxes, areas, min_size)
        overlaps = best_overlaps(boxes, store.boxes_of(place))
        num_objects += groups.sum(axis=1)
        num_found += groups.astype(np.float64) @ (overlaps >= 0.5)
        sum_overlap += groups.astype(np.float64) @ overlaps
    summaries = map(_summary, num_objects.tolist(), num_found, sum_overlap)
    return {"budgets": [*BUDGETS, "all"], **dict(zip(names, summaries, strict=True))}


def best_overlaps(objects: NDArray[np.float32], proposals: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the (G, budgets + 1) greatest IoU of each object with the first 1, 2, 3, ... 1000 and with all proposals.

    Args:
        objects: (G, 4) xyxy.
        proposals: (N, 4) xyxy, best first; without any, the IoU is 0.
    """
    if not len(proposals):
        return np.zeros((len(objects), len(BUDGETS) + 1))
    running = np.maximum.accumulate(pairwise_iou(objects, proposals), axis=1)  # (G, N)
    last = np.minimum([*BUDGETS, len(proposals)], len(proposals)) - 1
    return np.asarray(running[:, last])


def _groups(boxes: NDArray[np.float32], areas: NDArray[np.float32], min_size: float) -> NDArray[np.bool_]:
    """Return (groups, G) bool: True if object G is in the group."""
    small, large = _SIZE_LIMITS
    reaches = has_allowed_size(boxes, (1, 1), min_size, np.inf)
    is_small, is_large = areas < small, areas >= large
    return np.stack([np.ones(len(areas), dtype=bool), is_small, ~is_small & ~is_large, is_large, reaches])


def _summary(num_objects: int, num_found: NDArray[np.float64], sum_overlap: NDArray[np.float64]) -> dict[str, Any]:
    curves = {"recall_at_iou_0.5": num_found, "mean_best_overlap": sum_overlap}
    if not num_objects:
        return {"objects": 0, **dict.fromkeys(curves), "curve": None}
    places = {str(budget): place for place, budget in enumerate([*BUDGETS, "all"])}
    rounded = {key: [round(value, 4) for value in (sums / num_objects).tolist()] for key, sums in curves.items()}
    shown = {key: {name: values[places[name]] for name in _SHOWN} for key, values in rounded.items()}
    return {"objects": num_objects, **shown, "curve": rounded}
