import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts import matching
from aligndet_cli.detectors.parts.matching import (
    BACKGROUND,
    IGNORED,
    class_ids_of,
    instance_ids_of,
    match_by_iou,
    rank_by_number,
)

# Anchors of 10 x 10, side by side.
ANCHORS = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10], [30, 0, 40, 10]])


def match(boxes: list[list[float]], anchors: Tensor = ANCHORS, valid: Tensor | None = None) -> list[int]:
    (found,) = match_by_iou(
        anchors,
        [torch.tensor(boxes, dtype=torch.float32).view(-1, 4)],
        positive_iou=0.5,
        negative_iou=0.4,
        min_claim_iou=0.0,
        valid=torch.ones(1, len(anchors), dtype=torch.bool) if valid is None else valid[None],
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
    (found,) = match_by_iou(
        ANCHORS[:2],
        [torch.tensor([[5.0, 0, 15, 10]])],
        positive_iou=0.5,
        negative_iou=0.3,
        min_claim_iou=0.3,
        valid=torch.ones(1, 2, dtype=torch.bool),
        claims_all_ties=claims_all_ties,
    )
    assert found.tolist() == expected


def test_no_anchors() -> None:
    assert match([[0, 0, 10, 10]], torch.zeros(0, 4)) == []


# ---- all images at once, as on a GPU ----


def draw(num: int, generator: torch.Generator) -> Tensor:
    """Boxes with whole corners, among which are many exact ties."""
    corner = torch.rand(num, 2, generator=generator).mul(20).round()
    return torch.cat([corner, corner + torch.randint(0, 9, (num, 2), generator=generator)], dim=1)


@pytest.mark.parametrize("counts", [(3, 3), (0, 0), (0, 40, 1, 7), (130, 5, 0)])
@pytest.mark.parametrize("claims_all_ties", [True, False])
@pytest.mark.parametrize("has_own_anchors", [True, False])
def test_images_at_once_are_matched_as_one_by_one(
    counts: tuple[int, ...], claims_all_ties: bool, has_own_anchors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    boxes = [draw(count, generator) for count in counts]
    anchors = draw(200 * (len(counts) if has_own_anchors else 1), generator)
    anchors = anchors.view(len(counts), -1, 4) if has_own_anchors else anchors
    valid = torch.rand(len(counts), 200, generator=generator) > 0.2
    thresholds = {"positive_iou": 0.5, "negative_iou": 0.4, "min_claim_iou": 0.1, "claims_all_ties": claims_all_ties}
    alone = match_by_iou(anchors, boxes, valid=valid, **thresholds)
    monkeypatch.setattr(matching, "image_groups", lambda num, _device: [slice(0, num)])
    together = match_by_iou(anchors, boxes, valid=valid, **thresholds)
    assert together.shape == valid.shape and torch.equal(together, alone)
    assert sum(counts) == 0 or len(alone.unique()) > 3


def test_one_image_of_many_boxes_does_not_make_all_as_long() -> None:
    counts = [3, 600, 0, *[7] * 12, 40]
    ranked = rank_by_number([torch.full((count, 4), float(count)) for count in counts], torch.device("cpu"))
    assert [len(boxes) for boxes in ranked.boxes] == sorted(counts, reverse=True)
    assert torch.tensor(counts)[ranked.order][ranked.back].tolist() == counts
    seen = {image: 0 for image in range(len(counts))}
    compared = []
    for images, some in ranked.chunks(128):
        assert images.start == 0
        compared.append(images.stop * (some.stop - some.start))
        for image in range(images.stop):
            assert some.start == seen[image]  # in order, and none twice
            seen[image] = some.stop
    assert all(seen[image] >= len(boxes) for image, boxes in enumerate(ranked.boxes))
    assert max(compared) <= 128 and len(compared) == 7 and sum(compared) < 1.1 * sum(counts)


def test_classes_and_instances_of_matches() -> None:
    ids = [torch.tensor(some, dtype=torch.int64) for some in ([5, 7], [], [9])]
    targets = [BoxTargets(torch.zeros(len(some), 4), class_ids=some, instance_ids=some + 100) for some in ids]
    matched = torch.tensor([[1, BACKGROUND, 0], [IGNORED, BACKGROUND, BACKGROUND], [0, 0, IGNORED]])
    expected = [[7, BACKGROUND, 5], [IGNORED, BACKGROUND, BACKGROUND], [9, 9, IGNORED]]
    assert class_ids_of(targets, matched).tolist() == expected
    assert class_ids_of(targets[1:2], matched[1:2]).tolist() == expected[1:2]
    assert instance_ids_of(targets, matched[0], torch.tensor([0, 1, 0])).tolist() == [107, BACKGROUND, 105]
