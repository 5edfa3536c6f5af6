"""Suppression of overlapping boxes as one operation, which PyTorch runs here.

ONNX has the hard one as `NonMaxSuppression`. The soft one is written out there, box by box.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

from aligndet_cli.detectors.parts.postprocess import LEAST_SOFT_SCORE, take_softly


@torch.library.custom_op("aligndet::not_suppressed", mutates_args=())
def not_suppressed(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Return (B, G, N) bool: True for boxes that no better box of their group overlaps by more than an IoU.

    Args:
        boxes: (B, N, 4) xyxy, the same in all groups.
        scores: (B, G, N) of each box in each group; 0: it takes no part.
        iou: the limit.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for image, group in scores.amax(dim=2).nonzero().tolist():
        taking_part = scores[image, group].nonzero().squeeze(1)
        best = nms(boxes[image, taking_part], scores[image, group, taking_part], iou)
        kept[image, group, taking_part[best]] = True
    return kept


@not_suppressed.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@torch.library.custom_op("aligndet::softened", mutates_args=())
def softened(boxes: Tensor, scores: Tensor, class_ids: Tensor, iou: float, count: int) -> tuple[Tensor, Tensor]:
    """Return (B, count) scores that soft NMS has lowered, best first, and (B, count) int64 places of their boxes.

    Args:
        boxes: (B, N, 4) xyxy; N is 1 or more.
        scores: (B, N) of each box; 0: it takes no part.
        class_ids: (B, N) int64; boxes only lower those of their class.
        iou: the limit above which they do.
        count: rows to return; those of score 0 hold nothing.
    """
    taken = [take_softly(*of_image, iou, count) for of_image in zip(boxes, scores, class_ids, strict=True)]
    return torch.stack([of_image for of_image, _ in taken]).clamp(min=0), torch.stack([places for _, places in taken])


@softened.register_fake
def _(boxes: Tensor, scores: Tensor, class_ids: Tensor, iou: float, count: int) -> tuple[Tensor, Tensor]:
    size = scores.shape[0], count
    return scores.new_empty(size), class_ids.new_empty(size)


def by_group(scores: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return scores for `not_suppressed` (B, G, N), from (B, N) scores and the (B, N) or (N,) group of each."""
    known = torch.arange(num_groups, device=scores.device)[:, None]
    return torch.where(groups.unsqueeze(-2) == known, scores[:, None], 0.0)


def translations() -> dict[Any, Any]:
    """Return ONNX's forms of the operations, for `torch.onnx.export`; it needs the package onnxscript."""
    import onnxscript

    op: Any = onnxscript.opset18

    def to_onnx(boxes: Any, scores: Any, iou: float) -> Any:
        everything = torch.iinfo(torch.int64).max
        zero, one, half = (op.Constant(value_float=value) for value in (0.0, 1.0, 0.5))
        chosen = op.NonMaxSuppression(boxes, scores, everything, iou, 0.0)  # (M, 3) image, group, box
        ones = op.Expand(one, op.Shape(chosen, start=0, end=1))
        return op.Greater(op.ScatterND(op.Expand(zero, op.Shape(scores)), chosen, ones), half)

    return {
        torch.ops.aligndet.not_suppressed.default: to_onnx,
        torch.ops.aligndet.softened.default: partial(_write_softened, op),
    }


def _write_softened(op: Any, boxes: Any, scores: Any, class_ids: Any, iou: float, count: int) -> tuple[Any, Any]:
    """Write `softened` out in ONNX's operations, `count` times the same."""
    zero, one, limit, least = (op.Constant(value_float=value) for value in (0.0, 1.0, iou, LEAST_SOFT_SCORE))
    corners = [op.Squeeze(part, [2]) for part in op.Split(boxes, axis=2, num_outputs=4)]  # x1, y1, x2, y2, (B, N) each
    areas = op.Mul(op.Sub(corners[2], corners[0]), op.Sub(corners[3], corners[1]))
    left, found, places = scores, [], []
    for _ in range(count):
        found.append(op.ReduceMax(left, [1], keepdims=1))  # (B, 1)
        places.append(op.ArgMax(left, axis=1, keepdims=1))
        of_all = (*corners, areas, class_ids)
        x1, y1, x2, y2, area, class_id = (op.GatherElements(values, places[-1], axis=1) for values in of_all)
        width = op.Max(op.Sub(op.Min(corners[2], x2), op.Max(corners[0], x1)), zero)
        height = op.Max(op.Sub(op.Min(corners[3], y2), op.Max(corners[1], y1)), zero)
        shared = op.Mul(width, height)
        overlap = op.Div(shared, op.Sub(op.Add(areas, area), shared))
        is_lowered = op.And(op.Equal(class_ids, class_id), op.Greater(overlap, limit))
        left = op.Where(is_lowered, op.Mul(left, op.Sub(one, overlap)), left)
        left = op.Where(op.Less(left, least), zero, left)
        left = op.ScatterElements(left, places[-1], op.Mul(found[-1], zero), axis=1)
    return op.Concat(*found, axis=1), op.Concat(*places, axis=1)
