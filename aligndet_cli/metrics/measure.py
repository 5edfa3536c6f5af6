"""The one way to measure a detector on labelled images, for `evaluate` and for `finetune --evaluate-every`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aligndet_cli.config import DataConfig
from aligndet_cli.data.coco import to_coco_dict
from aligndet_cli.data.dataset import Category, ImageSet, one_line
from aligndet_cli.data.open import open_images
from aligndet_cli.data.stray import describe_stray_labels
from aligndet_cli.errors import DataError
from aligndet_cli.metrics.coco import CocoEvaluation, evaluate_coco
from aligndet_cli.metrics.voc import voc_metrics

Metric = Literal["coco", "voc"]


@dataclass(frozen=True)
class Measurement:
    """Metrics of a detector.

    Attributes:
        metrics: JSON values: those of `CocoEvaluation`, `segm` with the same of masks, `voc` with VOC's.
        evaluation: pycocotools' result for boxes.
        ground_truth: COCO json dict that the predictions were compared with.
    """

    metrics: dict[str, Any]
    evaluation: CocoEvaluation
    ground_truth: dict[str, Any]


def open_measured(
    data: DataConfig, trained: Sequence[Category], run_name: str, *, has_masks: bool, index_dir: Path | None
) -> ImageSet:
    """Read the images that a run is to be measured on, as its labels say them.

    Args:
        trained: classes of the run.

    Raises:
        DataError: the data cannot be read, has no labels, or other classes than the run.
    """
    image_set = open_truths(data, with_masks=has_masks, index_dir=index_dir)
    check_categories(run_name, trained, image_set)
    return image_set


def open_truths(data: DataConfig, *, with_masks: bool, index_dir: Path | None) -> ImageSet:
    """Read the images to measure on.

    Raises:
        DataError: the data cannot be read, or has no labels.
    """
    image_set = open_images(data, purpose="val", with_masks=with_masks, with_truths=True, index_dir=index_dir)
    if not image_set.has_labels:
        hint = describe_stray_labels(image_set.root) or "measuring needs them"
        raise DataError(f"{image_set.root}: no labels found for '{image_set.split}'; {hint}")
    return image_set


def check_categories(run_name: str, trained: Sequence[Category], image_set: ImageSet) -> None:
    """Refuse data whose classes differ in id or name from those the run was trained on; unused ids do not count.

    Raises:
        DataError: the classes differ.
    """
    ours = {category.category_id: category.name for category in trained if not category.is_unused}
    theirs = {category.category_id: category.name for category in image_set.categories}
    differences = [
        f"id {category_id} is {_quoted(ours.get(category_id))} in the run "
        f"and {_quoted(theirs.get(category_id))} in the data"
        for category_id in sorted({**ours, **theirs})
        if ours.get(category_id) != theirs.get(category_id)
    ]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise DataError(
            f"{image_set.annotations or image_set.root}: classes differ from those of run '{run_name}': "
            f"{'; '.join(differences[:3])}{more}. Evaluate on data with the same classes, or fine-tune on these"
        )


def _quoted(name: str | None) -> str:
    return "missing" if name is None else f"'{one_line(name)}'"


def choose_metric(asked: Literal["auto", "coco", "voc"], image_set: ImageSet) -> Metric:
    """Return the metric that is asked for; `auto` is VOC's for VOC data, else COCO's."""
    if asked != "auto":
        return asked
    return "voc" if image_set.format == "voc" else "coco"


def measure(
    image_set: ImageSet,
    predictions: Sequence[Mapping[str, Any]],
    *,
    metric: Metric,
    has_masks: bool,
    loose_iou: float | None = None,
) -> Measurement:
    """Compare predictions with the labels of all images of a set.

    Args:
        image_set: opened by `open_measured`.
        predictions: COCO results; `bbox` is xywh.
        loose_iou: see `evaluate_coco`.
    """
    ground_truth = to_coco_dict(image_set)
    evaluation = evaluate_coco(ground_truth, predictions, loose_iou=loose_iou)
    metrics = dict(evaluation.metrics)
    if has_masks:
        metrics["segm"] = evaluate_coco(ground_truth, predictions, iou_type="segm").metrics
    if metric == "voc":
        metrics["voc"] = voc_metrics(ground_truth, predictions)
    return Measurement(metrics, evaluation, ground_truth)


def headline(metrics: Mapping[str, Any], metric: Metric) -> tuple[str, float | None]:
    """Return name and value of the number for gates and tables."""
    return ("VOC AP12", metrics["voc"]["AP12"]) if metric == "voc" else ("AP", metrics["AP"])
