import json
from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.proposals.filters import (
    FilterRules,
    filter_proposals,
    has_allowed_ratio,
    has_allowed_size,
    nms,
    pairwise_iou,
)

GOLDEN = json.loads((Path(__file__).parent / "golden_filters.json").read_text())["images"]
SOCO = FilterRules(min_size=32, max_ratio=3, max_size=0.8, nms=0.5)


def boxes_of(*rows: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def to_xyxy(boxes_xywh: list[list[int]]) -> np.ndarray:
    boxes = np.array(boxes_xywh, dtype=np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["file"])
def test_filters_equal_soco(golden):
    rects, filtered = to_xyxy(golden["rects"]), to_xyxy(golden["filtered"])
    allowed = has_allowed_ratio(rects, 3) & has_allowed_size(rects, golden["size_hw"], 32, 0.8)
    np.testing.assert_array_equal(rects[allowed], filtered)
    np.testing.assert_array_equal(nms(filtered, 0.5), golden["kept"])
    np.testing.assert_array_equal(filter_proposals(rects, golden["size_hw"], SOCO), filtered[golden["kept"]])


def test_thresholds_belong_to_the_allowed_range():
    # On 100x100 px: 80x80 is exactly 0.8 of it; 32 px is the least side; 96x32 has ratio 3.
    boxes = boxes_of((0, 0, 80, 80), (0, 0, 81, 80), (0, 0, 32, 32), (0, 0, 31, 32), (0, 0, 96, 32), (0, 0, 97, 32))
    assert has_allowed_size(boxes, (100, 100), 32, 0.8).tolist() == [True, False, True, False, True, True]
    assert has_allowed_ratio(boxes, 3).tolist() == [True, True, True, True, True, False]


def test_image_left_with_nothing_falls_back():
    rules = FilterRules(min_size=32, max_ratio=3, max_size=0.8, nms=1)
    square, thin = (0.0, 0.0, 20.0, 20.0), (0.0, 0.0, 100.0, 10.0)
    # Both are too small: first the size rules go, then the ratio rule.
    assert filter_proposals(boxes_of(thin, square), (100, 100), rules).tolist() == [list(square)]
    assert filter_proposals(boxes_of(thin), (100, 100), rules).tolist() == [list(thin)]


def test_boxes_without_area_or_with_nan_never_pass():
    broken = boxes_of((5, 5, 5, 50), (9, 9, 2, 2), (np.nan, 0, 40, 40), (0, 0, np.inf, 40))
    assert filter_proposals(broken, (100, 100), SOCO).shape == (0, 4)


def test_no_boxes_stay_no_boxes():
    assert filter_proposals(boxes_of(), (100, 100), SOCO).shape == (0, 4)


def test_max_per_image_keeps_the_first():
    boxes = boxes_of((0, 0, 40, 40), (50, 50, 90, 90), (50, 0, 90, 40))
    rules = FilterRules(min_size=32, max_ratio=3, max_size=0.8, nms=0.5, max_per_image=2)
    assert filter_proposals(boxes, (100, 100), rules).tolist() == boxes[:2].tolist()


def test_nms_keeps_boxes_at_the_threshold():
    # IoU of 10x10 and its 5x10 half is 50 / 100 = 0.5 exactly; of the 6x10 part 0.6.
    boxes = boxes_of((0, 0, 10, 10), (0, 0, 5, 10), (0, 0, 6, 10))
    assert nms(boxes, 0.5).tolist() == [0, 1]
    assert nms(boxes[:2], 0.49).tolist() == [0]


def test_nms_equals_one_box_at_a_time():
    generator = np.random.default_rng(3)
    corners = generator.uniform(0, 60, (101, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(5, 40, (101, 2))], axis=1).astype(np.float32)
    iou = pairwise_iou(boxes, boxes)
    kept: list[int] = []
    for index in range(len(boxes)):
        if all(iou[earlier, index] <= 0.4 for earlier in kept):
            kept.append(index)
    assert nms(boxes, 0.4).tolist() == kept
    assert 5 < len(kept) < 101


def test_iou_of_empty_boxes_is_zero():
    assert pairwise_iou(boxes_of((1, 1, 1, 1)), boxes_of((1, 1, 1, 1))).tolist() == [[0.0]]
