"""hotcoco gives the same arrays, metrics and error analysis as pycocotools: it does not matter which is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from aligndet_cli.evaluate.analysis import TOUCH_IOU, analyse
from aligndet_cli.metrics import coco
from aligndet_cli.metrics.coco import CocoEvaluation, IouType, evaluate_coco

pytest.importorskip("hotcoco")
HEIGHT, WIDTH = 120, 160


def drawn_data(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw ground truth and predictions with all that matching depends on: crowds, ignored objects, equal scores and
    overlaps, classes without objects or detections, more than 100 detections in an image, empty boxes."""
    rng = np.random.default_rng(seed)
    images = [
        {"id": int(number), "height": HEIGHT, "width": WIDTH} for number in rng.permutation(50)[: rng.integers(1, 7)]
    ]
    categories = [{"id": int(number), "name": f"class {number}"} for number in rng.permutation(20)[:4]]
    truths: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    for image in images:
        for _ in range(rng.integers(0, 8)):
            box = _box(rng, largest=int(rng.choice([20, 100])))
            truths.append(
                {
                    "id": len(truths) + 1,
                    "image_id": image["id"],
                    "category_id": categories[rng.integers(0, 3)]["id"],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.15),
                    "segmentation": _code(box),
                }
            )
            for _ in range(rng.integers(0, 40)):
                near = [round(max(0.0, value + float(rng.choice([0, 0, 1.5, -3]))), 1) for value in box]
                predictions.append(_found(image["id"], categories[rng.integers(0, 4)]["id"], near, rng))
    return {"images": images, "categories": categories, "annotations": truths}, predictions


def _box(rng: np.random.Generator, largest: int) -> list[float]:
    width, height = rng.integers(1, largest, 2)
    return [float(rng.integers(0, WIDTH - width)), float(rng.integers(0, HEIGHT - height)), float(width), float(height)]


def _found(image_id: int, category_id: int, box: list[float], rng: np.random.Generator) -> dict[str, Any]:
    score = round(float(rng.random()), 1)  # many are equal
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "score": score,
        "segmentation": _code(box),
    }


def _code(box: list[float]) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    x, y, width, height = (int(value) for value in box)
    mask[y : y + height, x : x + width] = 1
    code = coco_mask.encode(mask)
    return {**code, "counts": code["counts"].decode()}


def by_both(
    monkeypatch: pytest.MonkeyPatch, truth: dict[str, Any], found: list[dict[str, Any]], iou_type: IouType
) -> list[CocoEvaluation]:
    assert coco._suits_hotcoco(truth)
    results = []
    for uses_it in (True, False):
        monkeypatch.setattr(coco, "_suits_hotcoco", lambda _, answer=uses_it: answer)
        results.append(evaluate_coco(truth, found, iou_type=iou_type, loose_iou=TOUCH_IOU))
        results.append(evaluate_coco(truth, found, iou_type=iou_type))
    monkeypatch.undo()
    return results


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(25))
def test_drawn_data(monkeypatch: pytest.MonkeyPatch, seed: int, iou_type: IouType) -> None:
    truth, found = drawn_data(seed)
    if seed == 3:
        found = []
    if seed == 4:
        truth["annotations"] = []
    results = by_both(monkeypatch, truth, found, iou_type)
    for one in results[1:]:
        assert json.dumps(one.metrics) == json.dumps(results[0].metrics)
        for field in ("precision", "iou_thresholds", "recall_thresholds"):
            ours, theirs = getattr(one, field), getattr(results[0], field)
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
    assert results[0].matches is not None and results[1].matches is None
    if iou_type == "bbox":
        ours, theirs = (analyse(result, truth, found) for result in (results[0], results[2]))
        assert json.dumps(ours) == json.dumps(theirs)


def test_a_drawn_set_is_measured_at_all() -> None:
    metrics = [evaluate_coco(*drawn_data(seed)).metrics for seed in range(25)]
    assert sum(0.05 < (one["AP"] or 0) < 0.95 for one in metrics) > 15
    assert sum(one["counts"]["ignored_ground_truths"] > 0 for one in metrics) > 10


def test_minicoco(monkeypatch: pytest.MonkeyPatch, shared_data: Path) -> None:
    truth = json.loads((shared_data / "minicoco" / "annotations" / "instances_val2017.json").read_text())
    rng = np.random.default_rng(3)
    found = [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": [round(float(value + rng.normal(0, 4)), 2) for value in entry["bbox"]],
            "score": round(float(rng.random()), 2),
        }
        for entry in truth["annotations"]
        for _ in range(4)
    ]
    fast, _, slow, _ = by_both(monkeypatch, truth, found, "bbox")
    assert json.dumps(fast.metrics) == json.dumps(slow.metrics) and fast.precision.tobytes() == slow.precision.tobytes()
    assert 0.05 < fast.metrics["AP"] < 0.95
    assert json.dumps(analyse(fast, truth, found)) == json.dumps(analyse(slow, truth, found))


def test_ids_that_it_does_not_know_are_measured_by_pycocotools() -> None:
    truth, found = drawn_data(0)
    first = min(truth["images"], key=lambda image: image["id"])
    usual = evaluate_coco(truth, found)
    for entry in (*truth["annotations"], *found):
        entry["image_id"] = -5 if entry["image_id"] == first["id"] else entry["image_id"]
    first["id"] = -5  # the first still: of equal scores, the order of the images decides
    assert not coco._suits_hotcoco(truth)
    assert evaluate_coco(truth, found).metrics == usual.metrics
