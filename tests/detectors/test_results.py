import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors.interface import Detections
from aligndet_cli.detectors.results import detections_to_coco, rescale_boxes

CATEGORIES = (Category(3, "cat"), Category(11, "dog"))


def test_boxes_are_scaled_by_the_true_factors_then_clipped():
    # 100 x 67 (h x w) became 151 x 100: factors 151 / 100 and 100 / 67.
    boxes = rescale_boxes(torch.tensor([[10.0, 15.1, 50.0, 75.5], [-3.0, -1.0, 120.0, 200.0]]), (151, 100), (100, 67))
    assert boxes[0].tolist() == pytest.approx([6.7, 10.0, 33.5, 50.0], rel=1e-6)
    assert boxes[1].tolist() == [0.0, 0.0, 67.0, 100.0]


def test_entries_have_original_ids_and_rounded_numbers():
    detections = Detections(torch.tensor([[2.0, 4.0, 8.0, 10.0]]), torch.tensor([0.123456789]), torch.tensor([1]))
    entries = detections_to_coco(detections, (30, 60), (10, 30), CATEGORIES)  # factors 3 down, 2 across
    assert entries == [{"category_id": 11, "bbox": [1.0, 1.333, 3.0, 2.0], "score": 0.123457}]


def test_no_detections():
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert detections_to_coco(empty, (30, 60), (10, 30), CATEGORIES) == []


def test_masks_are_drawn_into_their_boxes_at_the_original_size():
    # Left half of the box likely, right half not; x 10..30 and y 4..8 of 40 x 20 are 5..15 and 2..4 of 20 x 10.
    mask = torch.tensor([[0.9, 0.1], [0.9, 0.1]])[None]
    detections = Detections(torch.tensor([[10.0, 4, 30, 8]]), torch.tensor([0.5]), torch.tensor([0]), mask)
    (entry,) = detections_to_coco(detections, (20, 40), (10, 20), CATEGORIES)
    expected = np.zeros((10, 20), dtype=np.uint8)
    expected[2:4, 5:10] = 1
    assert entry["segmentation"]["size"] == [10, 20]
    np.testing.assert_array_equal(coco_mask.decode(entry["segmentation"]), expected)


def test_masks_at_the_border_and_in_boxes_without_area():
    boxes = torch.tensor([[30.0, 12, 40, 20], [7.0, 7, 7, 9]])
    detections = Detections(boxes, torch.ones(2), torch.tensor([0, 1]), torch.ones(2, 3, 3))
    first, second = detections_to_coco(detections, (20, 40), (20, 40), CATEGORIES)
    expected = np.zeros((20, 40), dtype=np.uint8)
    expected[12:20, 30:40] = 1
    # Beyond the box is 0: of a corner pixel, 0.15 by 0.1875 cells inside of it, 0.65 * 0.6875 = 0.45 is left.
    expected[[12, 12, 19, 19], [30, 39, 30, 39]] = 0
    np.testing.assert_array_equal(coco_mask.decode(first["segmentation"]), expected)
    assert coco_mask.decode(second["segmentation"]).sum() == 0
