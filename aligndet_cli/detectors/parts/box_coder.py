"""Boxes as offsets from reference boxes, and back.

Source: mmdetection `DeltaXYWHBBoxCoder` with unit standard deviations; Girshick et al., CVPR 2014, appendix C.
"""

import math

import torch
from torch import Tensor

# torchvision clamps the upper side only.
MAX_LOG_SCALE = abs(math.log(16 / 1000))


def encode_boxes(boxes: Tensor, references: Tensor) -> Tensor:
    """(N, 4) offsets (dx, dy, dw, dh) that turn `references` into `boxes`, both (N, 4) xyxy with positive sides."""
    centers, sides = _centers_and_sides(boxes)
    reference_centers, reference_sides = _centers_and_sides(references)
    return torch.cat([(centers - reference_centers) / reference_sides, (sides / reference_sides).log()], dim=-1)


def decode_boxes(deltas: Tensor, references: Tensor, size_hw: tuple[int, int] | None) -> Tensor:
    """The (N, 4) xyxy boxes that `encode_boxes` would give `deltas` for, clipped to the image.

    Args:
        deltas: (N, 4) dx, dy, dw, dh.
        references: (N, 4) xyxy.
        size_hw: height and width of the image in pixels; None: not clipped.
    """
    reference_centers, reference_sides = _centers_and_sides(references)
    centers = reference_centers + reference_sides * deltas[:, :2]
    half_sides = reference_sides * deltas[:, 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() * 0.5
    boxes = torch.cat([centers - half_sides, centers + half_sides], dim=-1)
    if size_hw is None:
        return boxes
    height, width = size_hw
    return torch.stack(
        [
            boxes[:, 0].clamp(0, width),
            boxes[:, 1].clamp(0, height),
            boxes[:, 2].clamp(0, width),
            boxes[:, 3].clamp(0, height),
        ],
        dim=-1,
    )


def _centers_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    top_left, bottom_right = boxes.split(2, dim=-1)
    return (top_left + bottom_right) * 0.5, bottom_right - top_left
