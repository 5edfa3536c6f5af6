import pytest
import torch

from aligndet_cli.detectors.parts.postprocess import select_detections
from helpers.plain_cascade import soften


def test_nms_is_per_class_and_sorted() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 50, 60, 60]])
    scores, class_ids = torch.tensor([0.5, 0.6, 0.7, 0.1]), torch.tensor([0, 0, 1, 0])
    found = select_detections(boxes, scores, class_ids, nms_iou=0.5, max_detections=100)
    torch.testing.assert_close(found.scores, torch.tensor([0.7, 0.6, 0.1]))
    assert found.class_ids.tolist() == [1, 0, 0]
    assert len(select_detections(boxes, scores, class_ids, nms_iou=0.5, max_detections=2).scores) == 2


def soft_loop(boxes: list, scores: list, class_ids: list, limit: float, count: int) -> list[tuple[float, int]]:
    """(score, place) of what is left, best first."""
    found = []
    for class_id in set(class_ids):
        places = [place for place in range(len(boxes)) if class_ids[place] == class_id]
        kept = soften([boxes[place] for place in places], [scores[place] for place in places], limit)
        found += [(score, places[place]) for score, place in kept]
    return sorted(found, reverse=True)[:count]


@pytest.mark.parametrize(("limit", "count"), [(0.5, 100), (0.3, 100), (0.1, 20)])
def test_soft_nms_is_a_loop(limit: float, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = 30 * torch.rand(80, 2, generator=generator)
    boxes = torch.cat([corners, corners + 5 + 20 * torch.rand(80, 2, generator=generator)], dim=1)
    scores, class_ids = torch.rand(80, generator=generator) ** 3, torch.arange(80) % 3
    expected = soft_loop(boxes.tolist(), scores.tolist(), class_ids.tolist(), limit, count)
    found = select_detections(boxes, scores, class_ids, nms_iou=limit, max_detections=count, nms_type="soft_nms")
    places = torch.tensor([place for _, place in expected])
    torch.testing.assert_close(found.scores, torch.tensor([score for score, _ in expected]))
    assert torch.equal(found.boxes, boxes[places]) and torch.equal(found.class_ids, class_ids[places])
    assert len(places) == count or (count == 100 and 30 < len(places) < 80)
    assert not torch.equal(found.scores, scores[places])


def test_soft_nms_of_nothing_is_nothing() -> None:
    boxes, none = torch.zeros(0, 4), torch.zeros(0)
    found = select_detections(boxes, none, none.long(), nms_iou=0.5, max_detections=9, nms_type="soft_nms")
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.class_ids.shape == (0,)
