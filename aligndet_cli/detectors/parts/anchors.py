"""Anchors on a pyramid's grid, in mmdetection's order and without its rounding differences to torchvision.

The anchors of one image are one list: levels from fine to coarse, then rows, columns, and the anchors of a cell.
So `anchor // num_per_cell` counts cells over all levels and `anchor % num_per_cell` is the slot in the cell.
"""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn

from aligndet_cli.detectors.interface import PAD_DIVISOR

SizeHW = tuple[int, int]


class AnchorGrid(nn.Module):
    """The anchors of a pyramid.

    Source: mmdetection `AnchorGenerator` (`center_offset=0`). torchvision rounds the base anchors to integers and
    derives strides from image and map sizes, which is wrong for sizes that are not multiples of the stride.

    Args:
        strides: pixels per cell of each level.
        scales: side of the square anchor in strides.
        ratios: height / width; the area does not depend on it.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float], ratios: Sequence[float]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.num_per_cell = len(scales) * len(ratios)
        bases = torch.stack([base_anchors(stride, scales, ratios) for stride in strides])  # (L, A, 4)
        self.bases: Tensor
        self.register_buffer("bases", bases, persistent=False)  # derived, so not in checkpoints

    def forward(self, grids_hw: Sequence[SizeHW]) -> Tensor:
        """All anchors of an image.

        Args:
            grids_hw: rows and columns of each level.

        Returns:
            (sum of H*W*A over levels, 4) xyxy float32, not clipped, in the order the module describes.
        """
        levels = []
        for stride, base, (rows, columns) in zip(self.strides, self.bases, grids_hw, strict=True):
            y = torch.arange(rows, device=base.device) * stride
            x = torch.arange(columns, device=base.device) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            corners = torch.stack([x, y, x, y], dim=-1)  # (H, W, 4)
            levels.append((corners[:, :, None] + base).view(-1, 4))
        return torch.cat(levels)

    def inside(self, grids_hw: Sequence[SizeHW], size_hw: SizeHW) -> Tensor:
        """Whether an anchor's cell touches the image, which counts as padded to a multiple of 32.

        Source: mmdetection `valid_flags` with the `pad_shape` of each image; torchvision uses all cells of the batch.

        Args:
            grids_hw: rows and columns of each level.
            size_hw: the image's own height and width in pixels.

        Returns:
            (anchors of an image,) bool.
        """
        height, width = (ceil(side / PAD_DIVISOR) * PAD_DIVISOR for side in size_hw)
        levels = []
        for stride, (rows, columns) in zip(self.strides, grids_hw, strict=True):
            row = torch.arange(rows, device=self.bases.device) < ceil(height / stride)
            column = torch.arange(columns, device=self.bases.device) < ceil(width / stride)
            levels.append((row[:, None] & column).flatten())
        return torch.cat(levels).repeat_interleave(self.num_per_cell)


def base_anchors(stride: int, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Anchors of the cell at the origin: (A, 4) xyxy float32 around (0, 0), ratio-major."""
    scale = torch.tensor(scales, dtype=torch.float32)
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()
    # float32 in mmdetection's order of operations: exact IoU ties decide low-quality matches
    half_width = (stride * (1 / root)[:, None] * scale).flatten() * 0.5
    half_height = (stride * root[:, None] * scale).flatten() * 0.5
    return torch.stack([-half_width, -half_height, half_width, half_height], dim=-1)
