"""Analysis of an AP: cost of each kind of error, confusions between classes, best and worst images.

Letters of shapes: P predictions, G ground truths, T IoU thresholds, K classes, D detections of one class.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from aligndet_cli.metrics.coco import CocoEvaluation, CocoMatches

RIGHT_IOU = 0.5
TOUCH_IOU = 0.1  # from the COCO analysis: a detection with this overlap is about the object, however badly placed
_THRESHOLDS = {0.75: 6, RIGHT_IOU: 1, TOUCH_IOU: 0}  # and their positions among the thresholds of `CocoMatches`
_RIGHT_LEVEL = 1
_RECALLS = np.linspace(0, 1, 101)  # pycocotools' own
PARTS = ("AP50", "localisation", "confusion", "background", "missed")
_NUM_IMAGES = 10
_NOTHING_RIGHT = 0.3  # score threshold if no detection is right, so that F1 is 0 at every score
_DECIMALS = 6


@dataclass(frozen=True)
class Matches:
    """Detections and ground truths of all images, matched by pycocotools.

    Attributes:
        categories: (P,) int64 category id of each detection.
        scores: (P,) float64.
        is_counted: (P,) bool, False beyond the best 100 detections of a class in an image.
        truth: (T, P) int64 row of the ground truth that a detection found, -1 for none.
        is_ignored: (T, P) bool, True if a detection is neither right nor wrong because it lies in a crowd.
        touches_other: (P,) bool, True if it overlaps a ground truth of another class by `TOUCH_IOU`.
        truth_categories: (G,) int64 category id of each ground truth.
        is_crowd: (G,) bool.
        overlaps: by image id, the rows of its p detections, of its g ground truths, and their (p, g) IoU.
    """

    categories: NDArray[np.int64]
    scores: NDArray[np.float64]
    is_counted: NDArray[np.bool_]
    truth: NDArray[np.int64]
    is_ignored: NDArray[np.bool_]
    touches_other: NDArray[np.bool_]
    truth_categories: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]
    overlaps: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]


def analyse(
    evaluation: CocoEvaluation, ground_truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the content of `analysis.json`.

    Args:
        evaluation: made with `loose_iou=TOUCH_IOU`.
        ground_truth: COCO json dict.
        predictions: COCO results; `bbox` is xywh.

    Returns:
        `precision_recall` (see `mean_curves`), `errors` (see `error_split`), `confusion` (see `confusion_counts`),
        `best_images` and `worst_images` (image ids and counts, by F1).
    """
    assert evaluation.matches is not None, "evaluate with `loose_iou`"
    matches = match_all(evaluation.matches, predictions)
    confusion, per_image = confusion_counts(matches)
    ranked = sorted(per_image, key=lambda image_id: _rank(per_image[image_id]))
    shown = {image_id: dict(zip(("right", "wrong", "missed"), per_image[image_id], strict=True)) for image_id in ranked}
    listed = [{"image_id": image_id, **shown[image_id]} for image_id in ranked]
    return {
        "precision_recall": mean_curves(evaluation),
        "errors": error_split(matches, ground_truth["categories"]),
        "confusion": confusion,
        "best_images": [entry for entry in reversed(listed) if entry["right"]][:_NUM_IMAGES],
        "worst_images": [entry for entry in listed if entry["wrong"] + entry["missed"]][:_NUM_IMAGES],
    }


def mean_curves(evaluation: CocoEvaluation) -> dict[str, list[float]]:
    """Return precision at 101 recalls, at IoU 0.5, 0.75 and on average: means over classes with ground truth."""
    has_truth = (evaluation.precision > -1).all(axis=(0, 1))  # (K,)
    over_classes = evaluation.precision[:, :, has_truth].mean(axis=2) if has_truth.any() else np.zeros((10, 0))
    half, three_quarters = (int(np.abs(evaluation.iou_thresholds - iou).argmin()) for iou in (0.5, 0.75))
    curves = {"0.5": over_classes[half], "0.75": over_classes[three_quarters], "mean": over_classes.mean(axis=0)}
    recall = {"recall": evaluation.recall_thresholds}
    return {name: [round(float(value), _DECIMALS) for value in curve] for name, curve in {**recall, **curves}.items()}


def error_split(matches: Matches, categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Split the distance of AP50 to 1 into parts by kind of error, which with AP50 add up to 1.

    Each part is the gain of AP at IoU 0.5 if, after the kinds before, errors of one more kind do not count:
    `localisation`: an overlap of 0.1 is enough; `confusion`: detections that overlap an object of another class by 0.1
    are left out; `background`: all other wrong detections are left out too, such as second detections of an object;
    `missed`: ground truths that no detection found.

    Returns:
        means of `PARTS` and `AP75` over classes with ground truth (null if there is none), and `per_class`.

    Source: `analyze` of the COCO API (Hoiem et al., 2012), without its step for similar classes, which needs super
    categories. We differ in one point: any number of detections may overlap the same object of another class.
    """
    per_class = []
    for category in categories:
        rows = np.flatnonzero(matches.is_counted & (matches.categories == category["id"]))
        rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
        num_truths = int(((matches.truth_categories == category["id"]) & ~matches.is_crowd).sum())
        parts = _class_parts(matches, rows, num_truths) if num_truths else dict.fromkeys(("AP75", *PARTS))
        per_class.append({"category_id": category["id"], "name": category["name"], **parts})
    means = {}
    for name in ("AP75", *PARTS):
        values = [entry[name] for entry in per_class if entry[name] is not None]
        means[name] = round(float(np.mean(values)), _DECIMALS) if values else None
    return {**means, "per_class": per_class}


def _class_parts(matches: Matches, rows: NDArray[np.int64], num_truths: int) -> dict[str, float]:
    """Return the parts of a class, from the (D,) rows of its detections by falling score."""
    is_right = matches.truth[:, rows] >= 0  # (T, D)
    is_kept = ~matches.is_ignored[:, rows]
    at_75, at_50, at_10 = (
        _average_precision(is_right[level][is_kept[level]], num_truths) for level in range(len(_THRESHOLDS))
    )
    right, kept = is_right[-1], is_kept[-1]
    unconfused = _average_precision(right[kept & (right | ~matches.touches_other[rows])], num_truths)
    only_right = _average_precision(right[kept & right], num_truths)
    steps = (at_50, at_10 - at_50, unconfused - at_10, only_right - unconfused, 1 - only_right)
    return {name: round(value, _DECIMALS) for name, value in zip(("AP75", *PARTS), (at_75, *steps), strict=True)}


def _average_precision(is_right: NDArray[np.bool_], num_truths: int) -> float:
    """Return the AP of (D,) verdicts by falling score, as pycocotools does: mean precision at 101 recalls."""
    if not is_right.size:
        return 0.0
    num_right = np.cumsum(is_right)
    precision = num_right / np.arange(1, len(is_right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(num_right / num_truths, _RECALLS, side="left")
    return float(np.append(envelope, 0.0)[places].mean())


def confusion_counts(matches: Matches) -> tuple[dict[str, Any], dict[int, tuple[int, int, int]]]:
    """Count which class is found as which at IoU 0.5, among detections above the score with the best F1.

    Detections first find objects of their own class, as matched by pycocotools. The others, best score first, find
    the object of another class that they overlap most among objects that are still free. Detections left then found
    nothing, and objects left were missed.

    Returns:
        a dict of `score_threshold`, `f1`, `iou_threshold` and `counts`, a list of `truth`, `found` and `count`
        (category ids; null for no object, or a missed one); and by image id the numbers of right detections, wrong
        detections, and objects that no detection of their class found.
    """
    threshold, f1 = _best_threshold(matches)
    counts: Counter[tuple[int | None, int | None]] = Counter()
    per_image: dict[int, tuple[int, int, int]] = {}
    for image_id in matches.overlaps:
        right, confused, nowhere, missed = _verdicts(matches, image_id, threshold)
        for row, truth in {**right, **confused}.items():
            counts[int(matches.truth_categories[truth]), int(matches.categories[row])] += 1
        counts.update((None, int(matches.categories[row])) for row in nowhere)
        counts.update((int(matches.truth_categories[truth]), None) for truth in missed)
        numbers = (len(right), len(confused) + len(nowhere), len(confused) + len(missed))
        if any(numbers):
            per_image[image_id] = numbers
    listed = [
        {"truth": truth, "found": found, "count": count}
        for (truth, found), count in sorted(counts.items(), key=lambda item: [(key is None, key) for key in item[0]])
    ]
    summary = {"score_threshold": threshold, "f1": f1, "iou_threshold": RIGHT_IOU, "counts": listed}
    return summary, per_image


def _verdicts(
    matches: Matches, image_id: int, threshold: float
) -> tuple[dict[int, int], dict[int, int], list[int], list[int]]:
    """Judge the detections of an image above a score threshold; see `confusion_counts`.

    Returns:
        rows of detections with the rows of the objects that they found, of their own class and of another; rows of
        detections that found nothing; rows of objects that were not found.
    """
    rows, truth_rows, overlaps = matches.overlaps[image_id]
    is_shown = ~matches.is_ignored[_RIGHT_LEVEL, rows] & (matches.scores[rows] >= threshold)
    found = matches.truth[_RIGHT_LEVEL, rows]
    right = {int(row): int(truth) for row, truth in zip(rows[is_shown], found[is_shown], strict=True) if truth >= 0}
    is_free = ~matches.is_crowd[truth_rows] & ~np.isin(truth_rows, list(right.values()))
    rest = np.flatnonzero(is_shown & (found < 0))
    confused: dict[int, int] = {}
    nowhere: list[int] = []
    for position in rest[np.argsort(-matches.scores[rows[rest]], kind="stable")]:
        candidates = np.where(is_free, overlaps[position], 0.0)
        if candidates.max(initial=0.0) < RIGHT_IOU:
            nowhere.append(int(rows[position]))
            continue
        best = int(candidates.argmax())
        confused[int(rows[position])] = int(truth_rows[best])
        is_free[best] = False
    return right, confused, nowhere, truth_rows[is_free].tolist()


def _best_threshold(matches: Matches) -> tuple[float, float]:
    """Return the score threshold with the best F1 over all classes at IoU 0.5, and that F1."""
    rows = np.flatnonzero(matches.is_counted & ~matches.is_ignored[_RIGHT_LEVEL])
    rows = rows[np.argsort(-matches.scores[rows], kind="stable")]
    is_right = matches.truth[_RIGHT_LEVEL, rows] >= 0
    if not is_right.any():
        return _NOTHING_RIGHT, 0.0
    num_truths = int((~matches.is_crowd).sum())
    f1 = 2 * np.cumsum(is_right) / (np.arange(1, len(rows) + 1) + num_truths)
    # Detections of equal score are kept together or not at all.
    f1[:-1][matches.scores[rows][:-1] == matches.scores[rows][1:]] = -1
    best = int(f1.argmax())
    return float(matches.scores[rows][best]), round(float(f1[best]), _DECIMALS)


def _rank(numbers: tuple[int, int, int]) -> tuple[float, int, int]:
    """Return the sort key of an image, worst first: by F1, then more errors, then fewer right detections."""
    right, wrong, missed = numbers
    return 2 * right / (2 * right + wrong + missed), -(wrong + missed), right


def match_all(found: CocoMatches, predictions: Sequence[Mapping[str, Any]]) -> Matches:
    """Return the matches at `_THRESHOLDS` as arrays; `predictions` are the COCO results that were matched."""
    truths = found.truths
    row_of = {entry["id"]: row for row, entry in enumerate(truths)}
    row_of[0] = -1  # not matched
    shape = (len(_THRESHOLDS), len(predictions))
    truth = np.full(shape, -1, dtype=np.int64)
    is_ignored, is_counted = np.zeros(shape, dtype=bool), np.zeros(len(predictions), dtype=bool)
    for group in found.per_group:
        if not group["dtIds"]:
            continue
        rows = np.array(group["dtIds"]) - 1  # pycocotools counts detections from 1
        is_counted[rows] = True
        for level, place in enumerate(_THRESHOLDS.values()):
            ignored = np.asarray(group["dtIgnore"][place], dtype=bool)
            is_ignored[level, rows] = ignored
            owners = [row_of[int(number)] for number in group["dtMatches"][place]]
            truth[level, rows] = np.where(ignored, -1, owners)
    categories = np.array([entry["category_id"] for entry in predictions], dtype=np.int64)
    truth_categories = np.array([entry["category_id"] for entry in truths], dtype=np.int64)
    overlaps = _overlaps(truths, predictions, is_counted)
    touches_other = np.zeros(len(predictions), dtype=bool)
    for rows, truth_rows, values in overlaps.values():
        is_other = categories[rows][:, None] != truth_categories[truth_rows][None]
        touches_other[rows] = (is_other & (values >= TOUCH_IOU)).any(axis=1)
    return Matches(
        categories=categories,
        scores=np.array([entry["score"] for entry in predictions], dtype=np.float64),
        is_counted=is_counted,
        truth=truth,
        is_ignored=is_ignored,
        touches_other=touches_other,
        truth_categories=truth_categories,
        is_crowd=np.array([bool(entry.get("iscrowd", 0)) for entry in truths], dtype=bool),
        overlaps=overlaps,
    )


def _overlaps(
    truths: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]], is_counted: NDArray[np.bool_]
) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    rows_of: dict[int, tuple[list[int], list[int]]] = {}
    for side, entries in enumerate((predictions, truths)):
        for row, entry in enumerate(entries):
            if side == 1 or is_counted[row]:
                rows_of.setdefault(entry["image_id"], ([], []))[side].append(row)
    overlaps = {}
    for image_id, (rows, truth_rows) in rows_of.items():
        values = np.zeros((len(rows), len(truth_rows)))
        if rows and truth_rows:
            boxes = np.array([predictions[row]["bbox"] for row in rows], dtype=np.float64)
            truth_boxes = np.array([truths[row]["bbox"] for row in truth_rows], dtype=np.float64)
            is_crowd = [int(truths[row].get("iscrowd", 0)) for row in truth_rows]
            values = np.asarray(coco_mask.iou(boxes, truth_boxes, is_crowd), dtype=np.float64)
        overlaps[image_id] = (np.array(rows, dtype=np.int64), np.array(truth_rows, dtype=np.int64), values)
    return overlaps
