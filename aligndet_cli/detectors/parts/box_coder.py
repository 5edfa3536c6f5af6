"""Encode boxes as offsets from reference boxes, and decode them.

Source: mmdetection `DeltaXYWHBBoxCoder` with unit standard deviations; Girshick et al., CVPR 2014, appendix C.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aligndet_cli.detectors.parts.cells import send

# torchvision clamps the upper side only.
MAX_LOG_SCALE = abs(math.log(16 / 1000))


def encode_boxes(boxes: Tensor, references: Tensor) -> Tensor:
    """Return the (N, 4) offsets (dx, dy, dw, dh) from `references` to `boxes`, both (N, 4) xyxy with positive sides."""
    centers, sides = _centers_and_sides(boxes)
    reference_centers, reference_sides = _centers_and_sides(references)
    return torch.cat([(centers - reference_centers) / reference_sides, (sides / reference_sides).log()], dim=-1)


def decode_boxes(deltas: Tensor, references: Tensor, size_hw: tuple[int, int] | None) -> Tensor:
    """Return the (..., 4) xyxy boxes at the offsets `deltas` from `references`; the inverse of `encode_boxes`.

    Args:
        deltas: (..., 4) dx, dy, dw, dh.
        references: (..., 4) xyxy.
        size_hw: height and width of the image, in pixels, to clip boxes to; None does not clip.
    """
    reference_centers, reference_sides = _centers_and_sides(references)
    centers = reference_centers + reference_sides * deltas[..., :2]
    half_sides = reference_sides * deltas[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() * 0.5
    boxes = torch.cat([centers - half_sides, centers + half_sides], dim=-1)
    if size_hw is None:
        return boxes
    height, width = size_hw
    limits = (width, height, width, height)
    return torch.stack([boxes[..., place].clamp(0, limit) for place, limit in enumerate(limits)], dim=-1)


def clip_each(boxes: Tensor, sizes_hw: Sequence[tuple[int, int]]) -> Tensor:
    """Return boxes (B, N, 4) xyxy, clipped to the height and width of each image in pixels."""
    limits = send([(width, height, width, height) for height, width in sizes_hw], boxes.device)  # (B, 4)
    return boxes.clamp(min=0).minimum(limits[:, None])


def _centers_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    top_left, bottom_right = boxes.split(2, dim=-1)
    return (top_left + bottom_right) * 0.5, bottom_right - top_left
