import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from aligndet_cli.metrics.coco import COCO_NUMBERS, evaluate_coco
from aligndet_cli.metrics.measure import measure
from helpers.data_sets import coco_content, make_coco


def _truth(boxes_xywh, *, crowd=(), first_id=1, image_ids=None):
    image_ids = image_ids or [7] * len(boxes_xywh)
    return {
        "images": [{"id": image_id, "width": 200, "height": 150} for image_id in sorted(set(image_ids))],
        "categories": [{"id": 3, "name": "cat"}, {"id": 11, "name": "dog"}],
        "annotations": [
            {
                "id": first_id + n,
                "image_id": image_id,
                "category_id": 3,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(n in crowd),
            }
            for n, (box, image_id) in enumerate(zip(boxes_xywh, image_ids, strict=True))
        ],
    }


def coco_metrics(*arguments, **options):
    return evaluate_coco(*arguments, **options).metrics


def _perfect(truth):
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]


def test_perfect_predictions_are_one_and_absent_sizes_null():
    truth = _truth([[0, 0, 50, 40], [100, 20, 60, 40]])  # areas 2000 and 2400: medium
    metrics = coco_metrics(truth, _perfect(truth))
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["APm"] == pytest.approx(1.0)
    assert metrics["APs"] is metrics["APl"] is None
    assert metrics["AR1"] == pytest.approx(0.5)  # one box per image finds one of two
    assert metrics["max_dets"] == [1, 10, 100]
    assert metrics["counts"] == {"images": 1, "ground_truths": 2, "ignored_ground_truths": 0, "predictions": 2}


def test_no_predictions_are_zero_not_a_crash():
    metrics = coco_metrics(_truth([[0, 0, 50, 40]]), [])
    assert (metrics["AP"], metrics["AR100"], metrics["counts"]["predictions"]) == (0.0, 0.0, 0)


def test_classes_without_ground_truth_are_null():
    truth = _truth([[0, 0, 50, 40]])
    per_class = coco_metrics(truth, _perfect(truth))["per_class"]
    assert [entry["name"] for entry in per_class] == ["cat", "dog"]
    assert per_class[1] == {"category_id": 11, "name": "dog", "AP": None, "AP50": None, "ground_truths": 0}
    assert per_class[0]["AP"] == pytest.approx(1.0)


def test_no_ground_truth_at_all_is_null():
    truth = {**_truth([[0, 0, 50, 40]]), "annotations": []}
    metrics = coco_metrics(truth, [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.5}])
    assert metrics["AP"] is None


def test_detections_in_crowds_do_not_count():
    truth = _truth([[0, 0, 50, 40], [80, 0, 100, 100]], crowd={1})
    inside = [{"image_id": 7, "category_id": 3, "bbox": [90, 10, 20, 20], "score": 0.99}] * 3
    metrics = coco_metrics(truth, _perfect(truth) + inside)
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["counts"]["ignored_ground_truths"] == 1
    assert metrics["per_class"][0]["ground_truths"] == 1
    elsewhere = [{**entry, "bbox": [10, 120, 20, 20]} for entry in inside]
    assert coco_metrics(truth, _perfect(truth) + elsewhere)["AP"] < 0.5


def test_listed_images_restrict_both_sides():
    truth = _truth([[0, 0, 50, 40], [0, 0, 50, 40]], image_ids=[7, 8])
    found = [entry for entry in _perfect(truth) if entry["image_id"] == 7]
    assert coco_metrics(truth, found)["AP"] == pytest.approx(0.5, abs=0.01)
    metrics = coco_metrics({**truth, "images": truth["images"][:1]}, _perfect(truth))
    assert (metrics["AP"], metrics["counts"]["images"], metrics["counts"]["predictions"]) == (pytest.approx(1.0), 1, 1)


def test_arguments_are_not_changed_and_stdout_stays_empty(capsys):
    truth = _truth([[0, 0, 50, 40]])
    found = _perfect(truth)
    before = json.dumps([truth, found])
    coco_metrics(truth, found)
    assert json.dumps([truth, found]) == before
    assert capsys.readouterr().out == ""


def test_masks_are_measured_by_their_own_area():
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    truth = _truth([[10, 10, 20, 20], [100, 20, 60, 40]])
    truth["annotations"][0]["segmentation"] = square
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
    code = coco.annToRLE(truth["annotations"][0])
    code["counts"] = code["counts"].decode()
    # The box is far too large: with its area the detection would not count as small.
    found = [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 150, 150], "segmentation": code, "score": 0.9}]
    metrics = coco_metrics(truth, found, iou_type="segm")
    assert (metrics["AP"], metrics["APs"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert metrics["counts"]["ground_truths_without_mask"] == 1


def test_minicoco_equals_pycocotools_on_its_own(shared_data: Path):
    file = shared_data / "minicoco" / "annotations" / "instances_val2017.json"
    truth = json.loads(file.read_text())
    assert coco_metrics(truth, _perfect(truth))["AP"] == pytest.approx(1.0)
    rng = np.random.default_rng(11)
    noisy = [
        {
            **entry,
            "bbox": [round(value, 3) for value in np.array(entry["bbox"]) + rng.normal(0, 4, 4)],
            "score": float(rng.random()),
        }
        for entry in _perfect(truth)
        if rng.random() < 0.8
    ]
    image_set = open_images(DataConfig(root=shared_data / "minicoco"), purpose="val", with_truths=True)
    evaluation = measure(image_set, noisy, metric="coco", has_masks=False).evaluation
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
        reference = COCOeval(coco, coco.loadRes([dict(entry) for entry in noisy]), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert 0.05 < evaluation.metrics["AP"] < 0.95
    assert [evaluation.metrics[name] for name in COCO_NUMBERS] == reference.stats.tolist()
    assert evaluation.precision.shape == (10, 101, 80)


ODDITIES = [
    ("annotations", "id", None),
    ("annotations", "id", 0),  # pycocotools on its own never finds it
    ("annotations", "id", 3),  # as another one
    ("annotations", "id", "0b2e7c1a-0000-4000-8000-000000000000"),
    ("annotations", "id", 2**60),
    ("annotations", "id", -3),
    ("annotations", "area", None),
    ("annotations", "area", "200"),
    ("annotations", "area", -1),
    ("annotations", "image_id", "20"),
    ("annotations", "category_id", 9.0),
    ("annotations", "ignore", "0"),
    ("annotations", "area", float("nan")),
    ("annotations", "iscrowd", None),
    ("annotations", "iscrowd", "0"),
    ("annotations", "iscrowd", False),
    ("annotations", "bbox", ["5", "6.0", "20", "10"]),
    ("images", "height", None),
    ("images", "height", "40"),
    ("images", "width", 60.0),
]


@pytest.mark.parametrize(("table", "key", "value"), ODDITIES)
@pytest.mark.parametrize("is_missing", [False, True])
def test_odd_labels_are_measured_as_their_clean_twin(
    tmp_path: Path, table: str, key: str, value: object, is_missing: bool
) -> None:
    """Fields that training converts or fills in are converted and filled in here too; the file may also lack them."""
    results = []
    for name in ("clean", "odd"):
        content = coco_content()
        content["annotations"][0] |= {"bbox": [5, 6, 20, 10], "area": 200, "iscrowd": 0}
        if name == "odd" and is_missing:
            content[table][0].pop(key, None)
        elif name == "odd":
            content[table][0][key] = value
        make_coco(tmp_path / name, content)
        if is_missing and key in ("bbox", "image_id", "category_id"):
            return  # cannot be filled in
        image_set = open_images(DataConfig(root=tmp_path / name), purpose="train", with_masks=True, with_truths=True)
        predictions = [
            {"image_id": 20, "category_id": 9, "bbox": [5, 6, 20, 10], "score": 0.9},
            {"image_id": 30, "category_id": 4, "bbox": [1, 2, 3, 5], "score": 0.8},
        ]
        metrics = measure(image_set, predictions, metric="coco", has_masks=False).metrics
        results.append((metrics, image_set.boxes.tolist(), image_set.is_crowd.tolist()))
    assert results[0] == results[1]
    assert results[0][0]["AP"] > 0


@pytest.mark.parametrize(
    "segmentation",
    [
        [[float("nan"), 0, 50, 0, 50, 40]],
        [[0, 0, 1e9, 0, 50, 40]],
        [[0, 0, 50, 40]],
        {"size": [150, 200], "counts": [10**12]},
        {"size": [4, 4], "counts": "04L4"},
        "text",
    ],
)
def test_masks_that_training_does_not_draw_are_left_out_and_counted(segmentation: object) -> None:
    truth = _truth([[0, 0, 50, 40], [100, 20, 60, 40]])
    good = [0, 0, 50, 0, 50, 40, 0, 40]
    truth["annotations"][0]["segmentation"] = good  # a flat list is one polygon
    truth["annotations"][1]["segmentation"] = segmentation
    mask = np.zeros((150, 200), dtype=np.uint8)
    mask[:40, :50] = 1
    code = coco_mask.encode(np.asfortranarray(mask))
    found = [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 50, 40], "segmentation": code, "score": 0.9}]
    metrics = coco_metrics(truth, found, iou_type="segm")
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["counts"]["ground_truths_without_mask"] == 1
