"""Numbers about a store of proposals: how many, how large, and how well they cover the labelled objects."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.proposals.filters import areas_of, has_allowed_size, pairwise_iou
from aligndet_cli.proposals.store import ProposalStore

BUDGETS: dict[str, int | None] = {"50": 50, "100": 100, "300": 300, "all": None}
_QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_SIZE_LIMITS = (32.0**2, 96.0**2)  # COCO's small / medium / large, in square pixels


def build_report(store: ProposalStore, image_set: ImageSet, num_skipped: int, min_size: float) -> dict[str, Any]:
    """JSON report of a store; the same for the same store and data.

    Args:
        min_size: objects with both sides of at least this many pixels are reported as a group of their own,
            since smaller ones cannot be proposed.
    """
    sides = store.boxes[:, 2:] - store.boxes[:, :2]
    counts = store.counts
    return {
        "images": len(store),
        "images_without_proposals": int((counts == 0).sum()),
        "skipped_images": num_skipped,
        "proposals": store.total,
        "proposals_per_image": _summary(counts),
        "size_px": _summary(np.sqrt(areas_of(store.boxes))),
        "aspect_ratio": _summary(sides[:, 0] / sides[:, 1]),
        "labels": _coverage(store, image_set, min_size) if image_set.has_labels else None,
    }


def best_overlaps(store: ProposalStore, image_set: ImageSet) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """How well each labelled object is covered.

    Crowds and objects of images that are not in the store are left out.

    Returns:
        (G, 4) greatest IoU of each object with the first 50 / 100 / 300 / all proposals of its image (0 if there
        is none), and (G,) int64 rows of the objects in `image_set.boxes`.
    """
    overlaps: list[NDArray[np.float64]] = [np.zeros((0, len(BUDGETS)))]
    rows: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    for position, image_id in enumerate(image_set.image_ids.tolist()):
        start, stop = image_set.offsets[position : position + 2]
        objects = start + np.flatnonzero(~image_set.is_crowd[start:stop])
        if not len(objects) or image_id not in store:
            continue
        proposals = store.boxes_of(store.index_of(image_id))
        iou = pairwise_iou(image_set.boxes[objects], proposals)  # (objects, proposals)
        overlaps.append(np.stack([iou[:, :budget].max(axis=1, initial=0.0) for budget in BUDGETS.values()], axis=1))
        rows.append(objects)
    return np.concatenate(overlaps), np.concatenate(rows)


def _coverage(store: ProposalStore, image_set: ImageSet, min_size: float) -> dict[str, Any]:
    overlaps, rows = best_overlaps(store, image_set)
    boxes, areas = image_set.boxes[rows], image_set.areas[rows]
    small, large = _SIZE_LIMITS
    groups = {
        "all": np.ones(len(rows), dtype=bool),
        "small": areas < small,
        "medium": (areas >= small) & (areas < large),
        "large": areas >= large,
        "reach_min_size": has_allowed_size(boxes, (1, 1), min_size, np.inf),
    }
    return {name: _coverage_of(overlaps[group]) for name, group in groups.items()}


def _coverage_of(overlaps: NDArray[np.float64]) -> dict[str, Any]:
    """Recall at IoU 0.5 by budget and mean best overlap (ABO, Uijlings 2013, over objects rather than classes)."""
    if not len(overlaps):
        return {"objects": 0, "recall_at_iou_0.5": None, "mean_best_overlap": None}
    recall = (overlaps >= 0.5).mean(axis=0)
    return {
        "objects": len(overlaps),
        "recall_at_iou_0.5": {name: _rounded(value) for name, value in zip(BUDGETS, recall, strict=True)},
        "mean_best_overlap": _rounded(overlaps[:, -1].mean()),
    }


def _summary(values: NDArray[Any]) -> dict[str, float] | None:
    if not values.size:
        return None
    quantiles = np.quantile(values, list(_QUANTILES.values()))
    named = {name: _rounded(value) for name, value in zip(_QUANTILES, quantiles, strict=True)}
    return {"mean": _rounded(values.mean(dtype=np.float64)), **named}


def _rounded(value: float) -> float:
    return round(float(value), 4)
