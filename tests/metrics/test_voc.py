import numpy as np
import pytest

from aligndet_cli.metrics.voc import average_precisions, match_detections, voc_metrics


def _truth(boxes_xywh, difficult=(), image_ids=None, category_id=1):
    image_ids = image_ids or [1] * len(boxes_xywh)
    return {
        "images": [{"id": image_id} for image_id in sorted(set(image_ids))],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": n + 1, "image_id": image_id, "category_id": category_id, "bbox": box, "iscrowd": int(n in difficult)}
            for n, (box, image_id) in enumerate(zip(boxes_xywh, image_ids, strict=True))
        ],
    }


def _found(*entries):
    return [{"image_id": i, "category_id": 1, "bbox": box, "score": score} for i, box, score in entries]


def test_two_of_three_found_with_one_mistake_between():
    truth = _truth([[0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10]])
    found = _found((1, [0, 0, 10, 10], 0.9), (1, [70, 70, 5, 5], 0.8), (1, [20, 0, 10, 10], 0.7))
    entry = voc_metrics(truth, found)["per_class"][0]
    # right, wrong, right: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3; the envelope is 1, 2/3, 2/3.
    assert entry["AP12"] == pytest.approx((1 + 2 / 3) / 3)
    # 11 points: recall 0, .1, .2, .3 -> 1; .4, .5, .6 -> 2/3; .7 ... 1 -> 0.
    assert entry["AP07"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert entry["ground_truths"] == 3


def test_classes_without_ground_truth_are_null_and_not_in_the_mean():
    truth = _truth([[0, 0, 10, 10]])
    metrics = voc_metrics(truth, _found((1, [0, 0, 10, 10], 0.9)))
    assert metrics["per_class"][1] == {"category_id": 2, "name": "dog", "AP07": None, "AP12": None, "ground_truths": 0}
    assert (metrics["AP07"], metrics["AP12"]) == (1.0, 1.0)


def test_nothing_found_is_zero():
    metrics = voc_metrics(_truth([[0, 0, 10, 10]]), [])
    assert (metrics["AP07"], metrics["AP12"]) == (0.0, 0.0)


def test_difficult_boxes_are_neither_to_be_found_nor_wrong_to_find():
    truth = _truth([[0, 0, 10, 10], [20, 0, 10, 10]], difficult={1})
    # Both on the difficult box (even twice) do not count; the third finds the only box that does.
    found = _found((1, [20, 0, 10, 10], 0.9), (1, [20, 0, 10, 10], 0.8), (1, [0, 0, 10, 10], 0.7))
    entry = voc_metrics(truth, found)["per_class"][0]
    assert (entry["AP12"], entry["ground_truths"]) == (1.0, 1)


def test_a_class_of_difficult_boxes_alone_is_null():
    assert voc_metrics(_truth([[0, 0, 10, 10]], difficult={0}), [])["per_class"][0]["AP12"] is None


def test_second_detection_of_a_box_is_wrong_even_beside_a_free_one():
    truth_boxes = {1: np.array([[0.0, 0, 10, 10], [4.0, 0, 14, 10]])}
    free = {1: np.zeros(2, dtype=bool)}
    # IoU of [1, 0, 11, 10] with the first is 9/11, with the second 7/13 >= 0.5: VOC takes the best one only.
    verdicts = match_detections(truth_boxes, free, [(1, [0, 0, 10, 10]), (1, [1, 0, 11, 10])])
    assert verdicts.tolist() == [1, 0]


def test_iou_of_exactly_one_half_is_enough():
    # [0, 0, 10, 10] and [0, 0, 10, 5]: 50 / 100.
    verdicts = match_detections({1: np.array([[0.0, 0, 10, 10]])}, {1: np.zeros(1, bool)}, [(1, [0, 0, 10, 5])])
    assert verdicts.tolist() == [1]


def test_boxes_of_other_images_do_not_match():
    truth = _truth([[0, 0, 10, 10]], image_ids=[1])
    assert voc_metrics(truth, _found((2, [0, 0, 10, 10], 0.9)))["AP12"] == 0.0


def test_recall_of_three_tenths_reaches_the_fourth_point():
    # 3 of 10 found without a mistake: recall 0, .1, .2, .3 -> 4 points of precision 1. In floats 3 * 0.1 > 0.3.
    assert average_precisions(np.ones(3, dtype=np.int64), 10)[0] == pytest.approx(4 / 11)


def test_area_rule_equals_a_plain_loop():
    rng = np.random.default_rng(5)
    for _ in range(50):
        verdicts = rng.choice([-1, 0, 1], size=rng.integers(0, 60))
        num_truths = int((verdicts == 1).sum() + rng.integers(1, 20))
        assert average_precisions(verdicts, num_truths)[1] == pytest.approx(_area_by_loop(verdicts, num_truths))


def _area_by_loop(verdicts, num_truths):
    """Follow the development kit step by step: envelope from the right, then rectangles where recall changes."""
    right = wrong = 0
    recalls, precisions = [0.0], [0.0]
    for verdict in verdicts:
        if verdict < 0:
            continue
        right, wrong = right + (verdict == 1), wrong + (verdict == 0)
        recalls.append(right / num_truths)
        precisions.append(right / (right + wrong))
    recalls.append(1.0)
    precisions.append(0.0)
    for i in range(len(precisions) - 2, -1, -1):
        precisions[i] = max(precisions[i], precisions[i + 1])
    return sum((recalls[i] - recalls[i - 1]) * precisions[i] for i in range(1, len(recalls)))
