"""Turn scored boxes into detections."""

from torch import Tensor
from torchvision.ops import batched_nms

from aligndet_cli.detectors.interface import Detections


def select_detections(
    boxes: Tensor, scores: Tensor, class_ids: Tensor, *, nms_iou: float, max_detections: int
) -> Detections:
    """Suppress boxes that overlap a better one of their class; return the rest, best first.

    Source: mmdetection `multiclass_nms`; as there, boxes that clipping left without area are kept.

    Args:
        boxes: (N, 4) xyxy float32, clipped to the image.
        scores: (N,) float32 in 0..1.
        class_ids: (N,) int64.
        nms_iou: boxes are suppressed above this IoU.
        max_detections: largest number of boxes to return.
    """
    keep = batched_nms(boxes, scores, class_ids, nms_iou)[:max_detections]
    return Detections(boxes=boxes[keep], scores=scores[keep], class_ids=class_ids[keep])
