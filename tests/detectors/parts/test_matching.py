import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from aligndet_cli.detectors.parts.matching import BACKGROUND, IGNORED, match_by_iou

# Anchors of 10 x 10, side by side.
ANCHORS = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10], [30, 0, 40, 10]])


def match(boxes: list[list[float]], anchors: Tensor = ANCHORS, valid: Tensor | None = None) -> list[int]:
    found = match_by_iou(
        anchors,
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        positive_iou=0.5,
        negative_iou=0.4,
        min_claim_iou=0.0,
        valid=torch.ones(len(anchors), dtype=torch.bool) if valid is None else valid,
    )
    return found.tolist()


def test_without_boxes_all_is_background() -> None:
    assert match([]) == [BACKGROUND] * 4


def test_thresholds() -> None:
    # Box 2 has IoU 0.45 with anchor 1 and no better one, so it claims it although box 1 fits exactly.
    # Box 3 has IoU 0.5 with anchor 2: exactly positive.
    boxes = [[0, 0, 10, 10], [10, 0, 20, 10], [10, 0, 20, 4.5], [20, 0, 30, 5], [30, 0, 40, 10]]
    assert match(boxes) == [0, 2, 3, 4]


def test_between_the_thresholds_is_ignored_and_below_is_background() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4.5], [0, 0, 10, 3]])
    # IoU of the box with them: 1, 0.45, 0.3
    assert match([[0, 0, 10, 10]], anchors) == [0, IGNORED, BACKGROUND]


def test_a_box_claims_all_its_best_anchors_on_exact_ties() -> None:
    # Centred between anchors 1 and 2: IoU 1/3 with both, below every threshold.
    assert match([[15, 0, 25, 10]]) == [BACKGROUND, 0, 0, BACKGROUND]


def test_the_last_claim_wins_over_a_better_overlap() -> None:
    # Both boxes overlap anchor 0 best: IoU 1 and 0.2.
    assert match([[0, 0, 10, 10], [0, 0, 10, 2]])[0] == 1
    assert match([[0, 0, 10, 2], [0, 0, 10, 10]])[0] == 1


def test_boxes_without_overlap_or_area_claim_nothing() -> None:
    assert match([[50, 50, 60, 60], [5, 5, 5, 5]]) == [BACKGROUND] * 4


def test_invalid_anchors_are_ignored_and_cannot_be_claimed() -> None:
    valid = torch.tensor([False, True, True, True])
    # The box covers anchor 0 best, but that is outside the image: anchor 1 (IoU 1/19) is next.
    assert match([[0, 0, 11, 10]], valid=valid) == [IGNORED, 0, BACKGROUND, BACKGROUND]


@pytest.mark.parametrize("num_boxes", [1, 16, 17, 60])
def test_chunks_give_what_one_matrix_gives(num_boxes: int) -> None:
    generator = torch.Generator().manual_seed(num_boxes)
    corner = torch.rand(300, 2, generator=generator).mul(20).round()  # integers: many exact ties
    anchors = torch.cat([corner, corner + 6], dim=1)
    boxes = anchors[torch.randperm(300, generator=generator)[:num_boxes]] + 1
    expected = match_in_loops(anchors, boxes)
    assert match(boxes.tolist(), anchors) == expected


def match_in_loops(anchors: Tensor, boxes: Tensor) -> list[int]:
    iou = box_iou(boxes, anchors)
    matched = []
    for column in iou.T.tolist():
        best = max(range(len(column)), key=column.__getitem__)  # first of the best
        matched.append(best if column[best] >= 0.5 else BACKGROUND if column[best] < 0.4 else IGNORED)
    for index, row in enumerate(iou.tolist()):
        for anchor, value in enumerate(row):
            if value == max(row) > 0:
                matched[anchor] = index
    return matched


@pytest.mark.parametrize(("claims_all_ties", "expected"), [(True, [0, 0]), (False, [0, IGNORED])])
def test_ties_can_go_to_the_first_alone(claims_all_ties: bool, expected: list[int]) -> None:
    # IoU of the box with both anchors: 50 / (100 + 100 - 50) = 1/3; neither positive nor background.
    found = match_by_iou(
        ANCHORS[:2],
        torch.tensor([[5.0, 0, 15, 10]]),
        positive_iou=0.5,
        negative_iou=0.3,
        min_claim_iou=0.3,
        valid=torch.ones(2, dtype=torch.bool),
        claims_all_ties=claims_all_ties,
    )
    assert found.tolist() == expected


def test_no_anchors() -> None:
    assert match([[0, 0, 10, 10]], torch.zeros(0, 4)) == []
