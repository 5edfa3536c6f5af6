import numpy as np
import pytest

from aligndet_cli.evaluate.analysis import PARTS, TOUCH_IOU, analyse
from aligndet_cli.metrics.coco import evaluate_coco

CAT, DOG = 3, 8


def _truth(annotations, num_images):
    return {
        "images": [{"id": number, "width": 100, "height": 100} for number in range(1, num_images + 1)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {"id": number, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for number, (i, c, box, crowd) in enumerate(annotations, start=1)
        ],
    }


def _analyse(truth, found):
    predictions = [
        {"image_id": i, "category_id": category, "bbox": box, "score": score} for i, category, box, score in found
    ]
    evaluation = evaluate_coco(truth, predictions, loose_iou=TOUCH_IOU)
    assert evaluation.metrics == evaluate_coco(truth, predictions).metrics  # one more IoU changes no number
    return evaluation, analyse(evaluation, truth, predictions)


@pytest.fixture(scope="module")
def worked_out():
    """Four cats, one dog and a crowd of cats; one cat's detection of each kind."""
    box = [0, 0, 10, 10]
    truth = _truth(
        [
            *((image, CAT, box, 0) for image in (1, 2, 3, 4)),
            (3, DOG, [50, 50, 10, 10], 0),
            (5, CAT, [0, 0, 50, 50], 1),
        ],
        num_images=6,
    )
    found = [
        (5, CAT, [10, 10, 10, 10], 0.99),  # in the crowd: does not count
        (3, CAT, [50, 50, 10, 10], 0.95),  # on the dog
        (1, CAT, box, 0.9),  # right
        (2, CAT, [0, 5, 10, 10], 0.8),  # IoU 50 / 150: badly placed
        (4, CAT, [80, 80, 10, 10], 0.7),  # on nothing
        (4, CAT, box, 0.6),  # right
    ]
    return _analyse(truth, found)[1]


def test_kinds_of_errors_of_a_class_worked_out_by_hand(worked_out):
    # By falling score: on the dog, right, badly placed, on nothing, right. AP is the mean over 101 recalls; 26 of them
    # lie in 0..0.25, and 25 in each of the other quarters.
    at_50 = 26 * 1 / 2 + 25 * 2 / 5
    at_10 = (26 + 25) * 2 / 3 + 25 * 3 / 5  # three of five are right: precision 1/2, 2/3, 3/5
    without_confused = (26 + 25) * 1 + 25 * 3 / 4  # three of four: 1, 1, 3/4
    all_right = 26 + 25 + 25
    steps = (at_50, at_10 - at_50, without_confused - at_10, all_right - without_confused, 101 - all_right)
    cat, dog = worked_out["errors"]["per_class"]
    assert [cat[part] for part in PARTS] == pytest.approx([step / 101 for step in steps], abs=1e-6)
    assert [dog[part] for part in PARTS] == [0, 0, 0, 0, 1]  # never found
    means = [worked_out["errors"][part] for part in PARTS]
    assert means == pytest.approx([(cat[part] + dog[part]) / 2 for part in PARTS], abs=1e-6)


def test_confusions_and_images_worked_out_by_hand(worked_out):
    # F1 = 2 right / (detections + 5 objects): 0/6, 2/7, 2/8, 2/9, 4/10: all five detections are kept.
    confusion = worked_out["confusion"]
    assert (confusion["score_threshold"], confusion["f1"]) == (0.6, 0.4)
    counts = {(entry["truth"], entry["found"]): entry["count"] for entry in confusion["counts"]}
    assert counts == {(CAT, CAT): 2, (CAT, None): 2, (DOG, CAT): 1, (None, CAT): 2}
    # In image 3 neither the cat nor the dog was found as what it is.
    worst = [tuple(entry.values()) for entry in worked_out["worst_images"]]
    assert worst == [(3, 0, 1, 2), (2, 0, 1, 1), (4, 1, 1, 0)]
    assert [entry["image_id"] for entry in worked_out["best_images"]] == [1, 4]


def test_equal_scores_are_kept_together():
    truth = _truth([(1, CAT, [0, 0, 10, 10], 0)], num_images=1)
    found = [(1, CAT, [0, 0, 10, 10], 0.5), (1, CAT, [60, 60, 10, 10], 0.5), (1, CAT, [80, 80, 10, 10], 0.4)]
    confusion = _analyse(truth, found)[1]["confusion"]
    assert (confusion["score_threshold"], confusion["f1"]) == (0.5, pytest.approx(2 / 3, abs=1e-6))


def test_parts_add_up_and_ap_is_that_of_pycocotools():
    rng = np.random.default_rng(0)
    truths, found = [], []
    for image in range(1, 9):
        for _ in range(int(rng.integers(1, 7))):
            category, box = int(rng.choice([CAT, DOG])), np.r_[rng.integers(0, 60, 2), rng.integers(8, 40, 2)]
            truths.append((image, category, box.tolist(), int(rng.random() < 0.1)))
            for _ in range(int(rng.integers(0, 4))):
                seen = category if rng.random() < 0.7 else CAT
                found.append((image, seen, (box + rng.normal(0, 3, 4)).clip(1).tolist(), round(rng.random(), 2)))
    evaluation, analysis = _analyse(_truth(truths, 8), found)
    errors = analysis["errors"]
    assert 0.05 < errors["AP50"] < 0.95 and min(errors[part] for part in PARTS) > 0
    for name in ("AP50", "AP75"):
        assert errors[name] == pytest.approx(evaluation.metrics[name], abs=1e-6)
    for entry in (errors, *errors["per_class"]):
        assert sum(entry[part] for part in PARTS) == pytest.approx(1, abs=1e-5)
    curves = analysis["precision_recall"]
    assert np.mean(curves["mean"]) == pytest.approx(evaluation.metrics["AP"], abs=1e-6)
    assert np.mean(curves["0.75"]) == pytest.approx(evaluation.metrics["AP75"], abs=1e-6)


@pytest.mark.parametrize("has_truth", [True, False])
def test_nothing_found(has_truth):
    analysis = _analyse(_truth([(1, CAT, [0, 0, 10, 10], 0)] if has_truth else [], num_images=2), [])[1]
    assert analysis["errors"]["missed"] == (1 if has_truth else None)
    assert analysis["precision_recall"]["mean"] == ([0.0] * 101 if has_truth else [])
    assert len(analysis["worst_images"]) == has_truth and analysis["best_images"] == []
