"""Recall of the labelled objects by the number of proposals looked at and by object size, and their precision."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.compiling import compiled
from aligndet_cli.data.dataset import ImageSet, positions_of
from aligndet_cli.proposals.filters import areas_of, has_allowed_size, pairwise_intersection, pairwise_iou

BUDGETS = (1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 70, 100, 140, 200, 300, 500, 700, 1000)
_SHOWN = ("50", "100", "300", "all")
# COCO's: IoU 0.5, 0.55, ... 0.95, and boxes per image of average recall
_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALL_BUDGETS = (10, 100, 1000)
_PRECISION_BUDGETS = (5, 15, 50)  # 15 and 50 are usual values of `pretrain-box --topk`
_SIZE_LIMITS = (32.0**2, 96.0**2)  # COCO's small / medium / large, in square pixels


def measure_recall(store: ProposalStore, image_set: ImageSet, min_size: float) -> dict[str, Any]:
    """Return recall, best overlap (ABO of Uijlings 2013, over objects instead of classes) and precision, as JSON.

    Crowds, and objects in images that are not in the store, are left out. Memory does not grow with the number of
    proposals or objects.

    Args:
        min_size: objects with both sides of at least this many pixels form a group, `reach_min_size`; smaller objects
            cannot be proposed.

    Returns:
        `{"budgets": [1, 2, 3, 5, ... 1000, "all"], "precision_at_iou_0.5": {"5": ..., "15": ..., "50": ...}}`, and for
        each group of objects their number, the values for the first 50, 100, 300 and all proposals of an image,
        `average_recall` for the first 10, 100 and 1000, and `curve` with the values for all budgets. Average recall
        and precision are COCO's without classes: a proposal matches one object at most, and precision leaves out
        proposals that lie in a crowd.
    """
    names = ("all", "small", "medium", "large", "reach_min_size")
    num_objects = np.zeros(len(names), dtype=np.int64)
    num_found, sum_overlap = np.zeros((2, len(names), len(BUDGETS) + 1))
    num_matched = np.zeros((len(names), len(_RECALL_BUDGETS)))
    num_right, num_judged = np.zeros((2, len(_PRECISION_BUDGETS)))
    for position, place in enumerate(positions_of(image_set.image_ids, store.image_ids).tolist()):
        if place < 0:
            continue
        start, stop = image_set.offsets[position : position + 2]
        is_crowd = image_set.is_crowd[start:stop]
        objects = start + np.flatnonzero(~is_crowd)
        boxes, proposals = image_set.boxes[objects], store.boxes_of(place)
        groups = _groups(boxes, image_set.areas[objects], min_size)
        iou = pairwise_iou(proposals, boxes)  # (N, G)
        overlaps = best_overlaps(iou)
        num_objects += groups.sum(axis=1)
        num_found += groups.astype(np.float64) @ (overlaps >= 0.5)
        sum_overlap += groups.astype(np.float64) @ overlaps
        iou = iou[: max(_RECALL_BUDGETS)]
        num_matched += [_count_matches(iou[:, is_member]) for is_member in groups]
        right, judged = _count_right(iou, proposals, image_set.boxes[start:stop][is_crowd])
        num_right += right
        num_judged += judged
    groups_of = map(_summary, num_objects.tolist(), num_found, sum_overlap, num_matched)
    precision = _rounded(num_right / np.maximum(num_judged, 1))
    return {
        "budgets": [*BUDGETS, "all"],
        "precision_at_iou_0.5": dict(zip(map(str, _PRECISION_BUDGETS), precision, strict=True)),
        **dict(zip(names, groups_of, strict=True)),
    }


def best_overlaps(iou: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the (G, budgets + 1) greatest IoU of each object with the first 1, 2, 3, ... 1000 and with all proposals.

    Args:
        iou: (N, G) of proposals, best first, and objects; without proposals, the greatest is 0.
    """
    if not len(iou):
        return np.zeros((iou.shape[1], len(BUDGETS) + 1))
    running = np.maximum.accumulate(iou, axis=0)  # (N, G)
    last = np.minimum([*BUDGETS, len(iou)], len(iou)) - 1
    return np.asarray(running[last].T)


@compiled
def match_greedily(iou: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the (T, G) position of the proposal that each object is matched with at each threshold; N for none.

    Proposals choose in turn, best first: each takes the object that it overlaps most of those that are left, if their
    IoU reaches the threshold. So the first k proposals match the same objects with and without the others.

    Source: `COCOeval.evaluateImg` of pycocotools; of equal overlaps the later object is taken, as there.

    Args:
        iou: (N, G) of proposals, best first, and objects.
        thresholds: (T,).
    """
    num_proposals, num_objects = iou.shape
    taken_by = np.full((len(thresholds), num_objects), num_proposals)
    for row in range(len(thresholds)):
        for proposal in range(num_proposals):
            best, chosen = thresholds[row], -1
            for thing in range(num_objects):
                if taken_by[row, thing] == num_proposals and iou[proposal, thing] >= best:
                    best, chosen = iou[proposal, thing], thing
            if chosen >= 0:
                taken_by[row, chosen] = proposal
    return taken_by


def _count_matches(iou: NDArray[np.float64]) -> list[float]:
    """Return the number of objects that the first 10, 100 and 1000 proposals match, a mean over the thresholds."""
    taken_by = match_greedily(iou, _THRESHOLDS)  # (T, G)
    taken_by = np.where(taken_by < len(iou), taken_by, max(_RECALL_BUDGETS))
    return [float((taken_by < budget).sum(axis=1).mean()) for budget in _RECALL_BUDGETS]


def _count_right(
    iou: NDArray[np.float64], proposals: NDArray[np.float32], crowds: NDArray[np.float32]
) -> tuple[list[int], ...]:
    """Return how many of the first 5, 15 and 50 proposals match an object at IoU 0.5, and how many of them count.

    Args:
        iou: (N, G) of proposals, best first, and objects.
        proposals: (N or more, 4) xyxy.
        crowds: (C, 4) xyxy; a proposal that matches no object does not count if half of it lies in one of them.
    """
    first = proposals[: max(_PRECISION_BUDGETS)]
    iou = iou[: len(first)]
    taken_by = match_greedily(iou, _THRESHOLDS[:1])[0]
    is_right = np.zeros(len(first), dtype=bool)
    is_right[taken_by[taken_by < len(first)]] = True
    in_crowd = (pairwise_intersection(first, crowds) >= 0.5 * areas_of(first)[:, None]).any(axis=1)
    counts = is_right | ~in_crowd
    return tuple([int(of[:budget].sum()) for budget in _PRECISION_BUDGETS] for of in (is_right, counts))


def _groups(boxes: NDArray[np.float32], areas: NDArray[np.float32], min_size: float) -> NDArray[np.bool_]:
    """Return (groups, G) bool: True if object G is in the group."""
    small, large = _SIZE_LIMITS
    reaches = has_allowed_size(boxes, (1, 1), min_size, np.inf)
    is_small, is_large = areas < small, areas >= large
    return np.stack([np.ones(len(areas), dtype=bool), is_small, ~is_small & ~is_large, is_large, reaches])


def _summary(
    num_objects: int,
    num_found: NDArray[np.float64],
    sum_overlap: NDArray[np.float64],
    num_matched: NDArray[np.float64],
) -> dict[str, Any]:
    curves = {"recall_at_iou_0.5": num_found, "mean_best_overlap": sum_overlap}
    if not num_objects:
        return {"objects": 0, **dict.fromkeys(curves), "average_recall": None, "curve": None}
    places = {str(budget): place for place, budget in enumerate([*BUDGETS, "all"])}
    rounded = {key: _rounded(sums / num_objects) for key, sums in curves.items()}
    shown = {key: {name: values[places[name]] for name in _SHOWN} for key, values in rounded.items()}
    average = dict(zip(map(str, _RECALL_BUDGETS), _rounded(num_matched / num_objects), strict=True))
    return {"objects": num_objects, **shown, "average_recall": average, "curve": rounded}


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
