"""Turn scored boxes into detections."""

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from aligndet_cli.detectors.interface import Detections
from aligndet_cli.detectors.parts.suppression import batched_nms

NMSType = Literal["nms", "soft_nms"]  # mmdetection's words
LEAST_SOFT_SCORE = 1e-3  # mmcv's `min_score`: boxes below it are dropped


def select_detections(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    *,
    nms_iou: float,
    max_detections: int,
    nms_type: NMSType = "nms",
) -> Detections:
    """Suppress boxes that overlap a better one of their class; return the rest, best first.

    Source: mmdetection `multiclass_nms`; as there, boxes that clipping left without area are kept.

    Args:
        boxes: (N, 4) xyxy float32, clipped to the image.
        scores: (N,) float32 in 0..1.
        class_ids: (N,) int64.
        nms_iou: boxes are suppressed above this IoU.
        max_detections: largest number of boxes to return.
        nms_type: `soft_nms` lowers the scores of such boxes instead.
    """
    if nms_type == "soft_nms":
        return _suppress_softly(boxes, scores, class_ids, nms_iou, max_detections)
    keep = batched_nms(boxes, scores, class_ids, nms_iou)[:max_detections]
    return Detections(boxes=boxes[keep], scores=scores[keep], class_ids=class_ids[keep])


def _suppress_softly(boxes: Tensor, scores: Tensor, class_ids: Tensor, nms_iou: float, count: int) -> Detections:
    if not len(boxes):
        return Detections(boxes=boxes, scores=scores, class_ids=class_ids)
    kept_scores, keep = take_softly(boxes, scores, class_ids, nms_iou, min(count, len(boxes)))
    is_left = kept_scores >= 0
    keep = keep[is_left]
    return Detections(boxes=boxes[keep], scores=kept_scores[is_left], class_ids=class_ids[keep])


def take_softly(boxes: Tensor, scores: Tensor, class_ids: Tensor, nms_iou: float, count: int) -> tuple[Tensor, Tensor]:
    """Take the best box `count` times; each time, scores of its class are multiplied by 1 - IoU above `nms_iou`.

    As scores only fall, these are the best, in order. A GPU is asked nothing before the end.

    Source: Bodla et al., ICCV 2017, the linear rule; mmcv `soft_nms`.

    Args:
        boxes: (N, 4) xyxy; one or more.
        scores, class_ids: (N,) each.
        count: K.

    Returns:
        (K,) lowered scores and (K,) int64 places of the boxes; scores below 0 where none is left.
    """
    left, places, found = scores, [], []
    for _ in range(count):
        score, place = left.max(dim=0, keepdim=True)
        places.append(place)
        found.append(score)
        overlap = box_iou(boxes[place], boxes)[0]
        is_lowered = (class_ids == class_ids[place]) & (overlap > nms_iou)
        left = torch.where(is_lowered, left * (1 - overlap), left)
        left = torch.where(left < LEAST_SOFT_SCORE, -1.0, left).index_fill(0, place, -1.0)
    return torch.cat(found), torch.cat(places)
