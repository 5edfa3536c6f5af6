"""Pascal VOC's AP at IoU 0.5, with the rules of 2007 (eleven points) and of 2010-2012 (area under the curve)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IOU_THRESHOLD = 0.5


def voc_metrics(ground_truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and per-class AP of both rules as JSON values (0..1, null for classes without ground truth).

    Args:
        ground_truth: a COCO json dict in which `iscrowd` marks VOC's difficult boxes, which count neither as missed
            nor as wrongly found.
        predictions: COCO results; `bbox` is xywh.

    Source: VOC development kit (VOCevaldet.m): per class, detections by falling score over all images; each takes
    the ground truth it overlaps most and is right at IoU >= 0.5 if that box is still free. We differ in nothing but
    the pixel convention: boxes here are continuous, so the kit's `+1` on inclusive pixel indices is already in them.
    """
    per_class = [_class_metrics(category, ground_truth, predictions) for category in ground_truth["categories"]]
    return {
        "AP07": _mean_of(per_class, "AP07"),
        "AP12": _mean_of(per_class, "AP12"),
        "iou_threshold": IOU_THRESHOLD,
        "per_class": per_class,
    }


def match_detections(
    truth_boxes: Mapping[int, NDArray[np.float64]],
    is_difficult: Mapping[int, NDArray[np.bool_]],
    detections: Sequence[tuple[int, Sequence[float]]],
) -> NDArray[np.int64]:
    """Return a verdict (D,) int64 on each detection of a class: 1 right, 0 wrong, -1 not counted (a difficult box).

    Args:
        truth_boxes: `{image_id: (N, 4) xyxy}`; images without boxes may be missing.
        is_difficult: `{image_id: (N,) bool}`.
        detections: `(image_id, xyxy)` by falling score.
    """
    is_free = {image_id: np.ones(len(boxes), dtype=bool) for image_id, boxes in truth_boxes.items()}
    verdicts = np.zeros(len(detections), dtype=np.int64)
    for position, (image_id, box) in enumerate(detections):
        overlaps = _iou_with_each(np.asarray(box, dtype=np.float64), truth_boxes.get(image_id, np.zeros((0, 4))))
        if not overlaps.size or overlaps.max() < IOU_THRESHOLD:
            continue
        best = int(overlaps.argmax())
        if is_difficult[image_id][best]:
            verdicts[position] = -1
        elif is_free[image_id][best]:
            is_free[image_id][best] = False
            verdicts[position] = 1
    return verdicts


def average_precisions(verdicts: NDArray[np.int64], num_truths: int) -> tuple[float, float]:
    """Return the AP by the rule of 2007 and the AP by the rule of 2010-2012 of verdicts (D,), see `match_detections`.

    `num_truths` counts the boxes that are not difficult, at least 1.
    """
    counted = verdicts[verdicts >= 0]
    num_right = np.cumsum(counted)  # (D',)
    precision = num_right / np.arange(1, len(counted) + 1)
    # Best precision at this or any higher recall.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # recall >= k / 10 in whole numbers: 3/10 must not miss the point 0.30000000000000004.
    reached = [np.flatnonzero(10 * num_right >= k * num_truths) for k in range(11)]
    eleven_point = sum(float(envelope[points[0]]) for points in reached if points.size) / 11
    # Recall rises by 1 / num_truths at each right detection and nowhere else.
    area = float(envelope[counted == 1].sum()) / num_truths
    return eleven_point, area


def _class_metrics(
    category: Mapping[str, Any], ground_truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    truths: dict[int, list[Mapping[str, Any]]] = {}
    for annotation in ground_truth["annotations"]:
        if annotation["category_id"] == category["id"]:
            truths.setdefault(annotation["image_id"], []).append(annotation)
    boxes = {image_id: np.array([_corners(entry["bbox"]) for entry in owned]) for image_id, owned in truths.items()}
    difficult = {
        image_id: np.array([bool(entry.get("iscrowd", 0)) for entry in owned]) for image_id, owned in truths.items()
    }
    # `sorted` is stable: detections of equal score stay in the order of the file.
    found = sorted(
        (entry for entry in predictions if entry["category_id"] == category["id"]), key=lambda entry: -entry["score"]
    )
    verdicts = match_detections(boxes, difficult, [(entry["image_id"], _corners(entry["bbox"])) for entry in found])
    num_truths = int(sum((~flags).sum() for flags in difficult.values()))
    ap07, ap12 = average_precisions(verdicts, num_truths) if num_truths else (None, None)
    return {
        "category_id": category["id"],
        "name": category["name"],
        "AP07": ap07,
        "AP12": ap12,
        "ground_truths": num_truths,
    }


def _corners(box_xywh: Sequence[float]) -> list[float]:
    left, top, width, height = box_xywh
    return [left, top, left + width, top + height]


def _iou_with_each(box: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU (N,) of one box (4,) with boxes (N, 4), xyxy."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = np.clip(sides, 0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _mean_of(per_class: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [entry[key] for entry in per_class if entry[key] is not None]
    return float(np.mean(values)) if values else None
