import torch

from aligndet_cli.detectors.parts.postprocess import select_detections


def test_nms_is_per_class_and_sorted() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 50, 60, 60]])
    scores, class_ids = torch.tensor([0.5, 0.6, 0.7, 0.1]), torch.tensor([0, 0, 1, 0])
    found = select_detections(boxes, scores, class_ids, nms_iou=0.5, max_detections=100)
    torch.testing.assert_close(found.scores, torch.tensor([0.7, 0.6, 0.1]))
    assert found.class_ids.tolist() == [1, 0, 0]
    assert len(select_detections(boxes, scores, class_ids, nms_iou=0.5, max_detections=2).scores) == 2
