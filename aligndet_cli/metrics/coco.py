"""COCO metrics. pycocotools is the only source of every number here, or hotcoco, which gives the same ones."""

import contextlib
import importlib
import importlib.util
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aligndet_cli.data.masks import encode_mask
from aligndet_cli.errors import DataError

IouType = Literal["bbox", "segm"]

# The order of pycocotools' `COCOeval.stats`.
COCO_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class CocoEvaluation:
    """Results of pycocotools for a set of predictions. K = classes, T = IoU thresholds, R = recall thresholds.

    Attributes:
        metrics: JSON values: the 12 numbers by name (0..1, null where nothing could be found), `per_class` (by category
            id: `category_id`, `name`, `AP`, `AP50`, `ground_truths` without crowds), `counts`, `max_dets`, `iou_type`.
        precision: (T, R, K) interpolated precision over all sizes and at most 100 boxes per image; -1 for a class
            without ground truth.
        iou_thresholds: (T,) 0.5, 0.55 ... 0.95.
        recall_thresholds: (R,) 0, 0.01 ... 1.
        matches: pairs of detections and ground truths; None if not asked for.
    """

    metrics: dict[str, Any]
    precision: NDArray[np.float64]
    iou_thresholds: NDArray[np.float64]
    recall_thresholds: NDArray[np.float64]
    matches: "CocoMatches | None" = None


@dataclass(frozen=True)
class CocoMatches:
    """Matches of pycocotools between boxes of all sizes. D = detections of a class in an image, at most the best 100.

    Attributes:
        truths: the ground truths that pycocotools saw, each with an `id` other than 0.
        per_group: its results for each class and image with any boxes: `dtIds` (D,), positions in the predictions
            from 1 on, and by threshold (`loose_iou` first) `dtMatches` (1 + T, D), the id of the ground truth or 0, and
            `dtIgnore` (1 + T, D), arrays or lists.
    """

    truths: list[dict[str, Any]]
    per_group: list[dict[str, Any]]


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    *,
    iou_type: IouType = "bbox",
    loose_iou: float | None = None,
) -> CocoEvaluation:
    """Run pycocotools, quietly; or hotcoco where it is installed, which is faster and gives equal arrays.

    Args:
        ground_truth: COCO json dict, see `to_coco_dict`; boxes and predictions of images that it does not list are left
            out.
        predictions: COCO results with the category ids of `ground_truth`; `bbox` is xywh.
        iou_type: `segm` compares `segmentation` (RLE); ground truths without a usable one are left out and counted.
        loose_iou: also return the matches, at this IoU too; no metric depends on it.
    """
    dataset, predictions = _select(ground_truth, predictions)
    num_without_mask = 0
    if iou_type == "segm":
        sizes_hw = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
        codes = [_code_of(entry, sizes_hw[entry["image_id"]]) for entry in dataset["annotations"]]
        with_mask = [
            {**entry, "segmentation": code}
            for entry, code in zip(dataset["annotations"], codes, strict=True)
            if code is not None
        ]
        num_without_mask = len(dataset["annotations"]) - len(with_mask)
        dataset["annotations"] = with_mask
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints, and stdout is for the result
        if loose_iou is None:
            evaluator, matches = _build_evaluator(dataset, predictions, iou_type), None
            evaluator.evaluate()
        else:
            evaluator, matches = _match(dataset, predictions, iou_type, loose_iou)
        evaluator.accumulate()
        evaluator.summarize()
    metrics = _summary(evaluator, dataset, predictions, iou_type)
    if iou_type == "segm":
        metrics["counts"]["ground_truths_without_mask"] = num_without_mask
    return CocoEvaluation(
        metrics=metrics,
        precision=evaluator.eval["precision"][:, :, :, 0, -1],
        iou_thresholds=np.asarray(evaluator.params.iouThrs),
        recall_thresholds=np.asarray(evaluator.params.recThrs),
        matches=matches,
    )


def _code_of(entry: Mapping[str, Any], size_hw: tuple[int, int]) -> dict[str, Any] | None:
    """Return the run-length code of a ground truth, None where training sees no mask either."""
    try:
        return encode_mask(entry["segmentation"], size_hw) if entry.get("segmentation") else None
    except DataError:  # of an image whose size the labels do not tell
        return None


def _match(
    dataset: dict[str, Any], predictions: Sequence[Mapping[str, Any]], iou_type: IouType, loose_iou: float
) -> tuple[Any, CocoMatches]:
    """Match boxes: return the evaluator after `evaluate`, and its matches at `loose_iou` and its own thresholds."""
    evaluator = _build_evaluator(dataset, predictions, iou_type)
    if _suits_hotcoco(dataset):  # which hands out copies, slowly, but is fast enough for a second pass
        evaluator.evaluate()
        wider = _build_evaluator(dataset, predictions, iou_type)
        wider.params.areaRng, wider.params.areaRngLbl = wider.params.areaRng[:1], wider.params.areaRngLbl[:1]
        wider.params.iouThrs = [loose_iou, *wider.params.iouThrs]
        wider.evaluate()
        return evaluator, CocoMatches(dataset["annotations"], [one for one in wider.evalImgs if one is not None])
    # The looser threshold is removed again, since a second pass would double the time.
    evaluator.params.iouThrs = np.concatenate([[loose_iou], evaluator.params.iouThrs])
    evaluator.evaluate()
    evaluator.params.iouThrs = evaluator.params.iouThrs[1:]
    groups = [group for group in evaluator.evalImgs if group is not None]
    of_all_sizes = [dict(group) for group in groups if group["aRng"] == evaluator.params.areaRng[0]]
    for group in groups:
        for name in ("dtMatches", "dtIgnore", "gtMatches"):
            group[name] = group[name][1:]
    return evaluator, CocoMatches(dataset["annotations"], of_all_sizes)


def _select(
    ground_truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Return the boxes and predictions of the listed images in the form that pycocotools takes."""
    chosen = {int(image["id"]) for image in ground_truth["images"]}
    annotations = [entry for entry in ground_truth["annotations"] if entry["image_id"] in chosen]
    dataset = {
        "images": list(ground_truth["images"]),
        "categories": list(ground_truth["categories"]),
        "annotations": [dict(entry) for entry in annotations],  # pycocotools writes into them
    }
    return dataset, [entry for entry in predictions if entry["image_id"] in chosen]


def _build_evaluator(dataset: dict[str, Any], predictions: Sequence[Mapping[str, Any]], iou_type: IouType) -> Any:
    """Return the `COCOeval` of hotcoco or pycocotools, with the same attributes."""
    data_class, evaluator_class = _classes_for(dataset)
    truth = data_class()
    # Without names, since hotcoco cannot take all that Python can write.
    truth.dataset = {
        **dataset,
        "categories": [{"id": one["id"], "name": str(one["id"])} for one in dataset["categories"]],
    }
    truth.createIndex()
    # With both keys pycocotools would take a mask's size from its box.
    unused = "bbox" if iou_type == "segm" else "segmentation"
    entries = [{key: value for key, value in entry.items() if key != unused} for entry in predictions]
    if entries:
        found = truth.loadRes(entries)
    else:  # `loadRes` looks at the first entry
        found = data_class()
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    return evaluator_class(truth, found, iou_type)


def _classes_for(dataset: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return `COCO` and `COCOeval`, of hotcoco or of pycocotools."""
    if not _suits_hotcoco(dataset):
        return COCO, COCOeval
    hotcoco = importlib.import_module("hotcoco")
    return hotcoco.COCO, hotcoco.COCOeval


def _suits_hotcoco(dataset: Mapping[str, Any]) -> bool:
    """Return True if hotcoco is installed and takes the data: it knows no negative ids."""
    ids = (entry["id"] for table in ("images", "categories", "annotations") for entry in dataset[table])
    return importlib.util.find_spec("hotcoco") is not None and all(number >= 0 for number in ids)


def _summary(
    evaluator: Any, dataset: dict[str, Any], predictions: Sequence[Mapping[str, Any]], iou_type: IouType
) -> dict[str, Any]:
    names = {entry["id"]: entry["name"] for entry in dataset["categories"]}
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (T, R, K)
    is_crowd = [bool(entry.get("iscrowd", 0)) for entry in dataset["annotations"]]
    truths = Counter(entry["category_id"] for entry in dataset["annotations"] if not entry.get("iscrowd", 0))
    per_class = [
        {
            "category_id": int(category_id),
            "name": names[category_id],
            "AP": _mean(precision[:, :, index]),
            "AP50": _mean(precision[0, :, index]),
            "ground_truths": truths[category_id],
        }
        for index, category_id in enumerate(evaluator.params.catIds)
    ]
    numbers = zip(COCO_NUMBERS, evaluator.stats, strict=True)
    return {
        **{name: None if value == -1 else float(value) for name, value in numbers},
        "per_class": per_class,
        "counts": {
            "images": len(dataset["images"]),
            "ground_truths": len(is_crowd) - sum(is_crowd),
            "ignored_ground_truths": sum(is_crowd),
            "predictions": len(predictions),
        },
        "max_dets": [int(count) for count in evaluator.params.maxDets],
        "iou_type": iou_type,
    }


def _mean(values: NDArray[np.float64]) -> float | None:
    """Return the mean of values (any shape) without -1, which marks unmeasured ones; None if nothing is left."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else None
