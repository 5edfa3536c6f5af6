"""Suppression of overlapping boxes as one operation, which PyTorch runs here and ONNX has as `NonMaxSuppression`."""

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms


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


def by_group(scores: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return scores for `not_suppressed` (B, G, N), from (B, N) scores and the (B, N) or (N,) group of each."""
    known = torch.arange(num_groups, device=scores.device)[:, None]
    return torch.where(groups.unsqueeze(-2) == known, scores[:, None], 0.0)


def translations() -> dict[Any, Any]:
    """Return ONNX's form of the operation, for `torch.onnx.export`; it needs the package onnxscript."""
    import onnxscript

    op: Any = onnxscript.opset18

    def to_onnx(boxes: Any, scores: Any, iou: float) -> Any:
        everything = torch.iinfo(torch.int64).max
        zero, one, half = (op.Constant(value_float=value) for value in (0.0, 1.0, 0.5))
        chosen = op.NonMaxSuppression(boxes, scores, everything, iou, 0.0)  # (M, 3) image, group, box
        ones = op.Expand(one, op.Shape(chosen, start=0, end=1))
        return op.Greater(op.ScatterND(op.Expand(zero, op.Shape(scores)), chosen, ones), half)

    return {torch.ops.aligndet.not_suppressed.default: to_onnx}
