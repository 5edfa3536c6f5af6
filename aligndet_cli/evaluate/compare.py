"""Comparison of two evaluations of the same images."""

from collections.abc import Mapping
from typing import Any

from aligndet_cli.data.dataset import class_labels
from aligndet_cli.metrics.coco import COCO_NUMBERS

VOC_NUMBERS = ("AP07", "AP12")


def compare_runs(metrics_a: Mapping[str, Any], metrics_b: Mapping[str, Any]) -> dict[str, Any]:
    """Compare A with B: `{"this", "other", "delta"}` per number, with delta = A - B, null if one has no value.

    Args:
        metrics_a, metrics_b: contents of two `metrics.json`.

    Returns:
        the COCO numbers by name; `voc` and `segm` if both have them; `per_class` AP by label of the class.
    """
    comparison: dict[str, Any] = {name: _difference(metrics_a[name], metrics_b[name]) for name in COCO_NUMBERS}
    for group, names in (("voc", VOC_NUMBERS), ("segm", COCO_NUMBERS)):
        if metrics_a.get(group) and metrics_b.get(group):
            comparison[group] = {name: _difference(metrics_a[group][name], metrics_b[group][name]) for name in names}
    labels = class_labels({entry["category_id"]: entry["name"] for entry in metrics_a["per_class"]})
    others = {entry["category_id"]: entry["AP"] for entry in metrics_b["per_class"]}
    comparison["per_class"] = {
        labels[entry["category_id"]]: _difference(entry["AP"], others[entry["category_id"]])
        for entry in metrics_a["per_class"]
        if entry["category_id"] in others
    }
    return comparison


def _difference(this: float | None, other: float | None) -> dict[str, float | None]:
    return {"this": this, "other": other, "delta": None if this is None or other is None else this - other}
