"""Anchors on a pyramid's grid, and the boxes they are matched to.

The anchors of one image are one list: levels from fine to coarse, then rows, columns, and the anchors of a cell.
So `anchor // num_per_cell` counts cells over all levels and `anchor % num_per_cell` is the slot in the cell.
"""

from collections.abc import Sequence
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn

from aligndet_cli.data.batch import PAD_DIVISOR, BoxTargets
from aligndet_cli.detectors.parts.cells import send
from aligndet_cli.detectors.parts.matching import match_by_iou

SizeHW = tuple[int, int]
AnchorStyle = Literal["exact", "torchvision"]


class AnchorGrid(nn.Module):
    """The anchors of a pyramid.

    Source: mmdetection `AnchorGenerator` (`center_offset=0`), in its order. In torchvision's style, sides and then
    corners are rounded to whole pixels, and the cells of a level are spread evenly over the padded image: their
    distance is less than the stride if the image's size is no multiple of it.

    Args:
        strides: pixels per cell of each level.
        scales: side of the square anchor in strides.
        ratios: height / width, at constant area.
        style: mmdetection's (exact) or torchvision's, for weights that were trained with those.
    """

    def __init__(
        self,
        strides: Sequence[int],
        scales: Sequence[float],
        ratios: Sequence[float],
        style: AnchorStyle = "exact",
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.style = style
        self.num_per_cell = len(scales) * len(ratios)
        of_level = rounded_base_anchors if style == "torchvision" else base_anchors
        bases = torch.stack([of_level(stride, scales, ratios) for stride in strides])  # (L, A, 4)
        self.bases: Tensor
        self.register_buffer("bases", bases, persistent=False)  # derived, so not in checkpoints

    def forward(self, grids_hw: Sequence[SizeHW]) -> Tensor:
        """Return all anchors of an image: (N, 4) xyxy float32, not clipped; N is the sum of H * W * A over levels.

        Args:
            grids_hw: rows and columns of each level.
        """
        levels = []
        for stride, base, (rows, columns) in zip(self.strides, self.bases, grids_hw, strict=True):
            down, right = (stride, stride) if self.style == "exact" else self._spread(grids_hw[0], (rows, columns))
            y = torch.arange(rows, device=base.device) * down
            x = torch.arange(columns, device=base.device) * right
            y, x = torch.meshgrid(y, x, indexing="ij")
            corners = torch.stack([x, y, x, y], dim=-1)  # (H, W, 4)
            levels.append((corners[:, :, None] + base).view(-1, 4))
        return torch.cat(levels)

    def _spread(self, finest_hw: SizeHW, grid_hw: SizeHW) -> SizeHW:
        """Return the distances, in pixels of the padded image, between the rows and columns of a level.

        The finest grid gives the image's size exactly, because its stride divides `PAD_DIVISOR`.
        """
        rows, columns = grid_hw
        return finest_hw[0] * self.strides[0] // rows, finest_hw[1] * self.strides[0] // columns

    @torch.no_grad()
    def match(
        self,
        grids_hw: Sequence[SizeHW],
        sizes_hw: Sequence[SizeHW],
        targets: Sequence[BoxTargets],
        *,
        positive_iou: float,
        negative_iou: float,
        min_claim_iou: float,
        within_image: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Match each anchor to a box of its image.

        Args:
            grids_hw: rows and columns of each level.
            sizes_hw: height and width of each image in pixels, without padding.
            targets: boxes of each image.
            positive_iou, negative_iou, min_claim_iou: see `match_by_iou`.
            within_image: ignore anchors that cross the border of the image (mmdetection's `allowed_border=0`).

        Returns:
            (A, 4) xyxy anchors, the same for all images, and (B, A) int64: index of the box in its image,
            `BACKGROUND` or `IGNORED`.
        """
        anchors = self(grids_hw)
        valid = self.inside(grids_hw, sizes_hw)
        if within_image:
            valid &= _lies_within(anchors, sizes_hw)
        matched = match_by_iou(
            anchors,
            [of_image.boxes for of_image in targets],
            positive_iou=positive_iou,
            negative_iou=negative_iou,
            min_claim_iou=min_claim_iou,
            valid=valid,
        )
        return anchors, matched

    def inside(self, grids_hw: Sequence[SizeHW], sizes_hw: Sequence[SizeHW]) -> Tensor:
        """Return (B, A) bool: True for anchors whose cell touches the image, padded to a multiple of 32.

        Source: mmdetection `valid_flags` with the `pad_shape` of each image; torchvision uses all cells of the batch.

        Args:
            grids_hw: rows and columns of each level.
            sizes_hw: height and width of each image in pixels, without padding.
        """
        # Of each level, the cells that touch each image: (L, B) rows and columns.
        num_rows, num_columns = (
            send([[ceil(_padded(side) / stride) for side in sides] for stride in self.strides], self.bases.device)
            for sides in zip(*sizes_hw, strict=True)
        )
        levels = []
        for (rows, columns), own_rows, own_columns in zip(grids_hw, num_rows, num_columns, strict=True):
            row = torch.arange(rows, device=own_rows.device) < own_rows[:, None]  # (B, H)
            column = torch.arange(columns, device=own_rows.device) < own_columns[:, None]  # (B, W)
            levels.append((row[:, :, None] & column[:, None]).flatten(1))
        return torch.cat(levels, dim=1)[:, :, None].expand(-1, -1, self.num_per_cell).flatten(1)


def _padded(side: int) -> int:
    return ceil(side / PAD_DIVISOR) * PAD_DIVISOR


def _lies_within(boxes: Tensor, sizes_hw: Sequence[SizeHW]) -> Tensor:
    """Return (B, A) bool: True for (A, 4) xyxy boxes that end before the border of each image.

    Source: mmdetection `anchor_inside_flags`; a box that ends on the right or bottom border crosses it.
    """
    height, width = send(list(zip(*sizes_hw, strict=True)), boxes.device)[:, :, None]
    return (boxes[:, :2] >= 0).all(dim=1) & (boxes[:, 2] < width) & (boxes[:, 3] < height)


def base_anchors(stride: int, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Return the anchors of the cell at the origin: (A, 4) xyxy float32 around (0, 0), ratio-major."""
    scale = torch.tensor(scales, dtype=torch.float32)
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()
    # float32 in mmdetection's order of operations: exact IoU ties decide low-quality matches
    half_width = (stride * (1 / root)[:, None] * scale).flatten() * 0.5
    half_height = (stride * root[:, None] * scale).flatten() * 0.5
    return torch.stack([-half_width, -half_height, half_width, half_height], dim=-1)


def rounded_base_anchors(stride: int, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Return `base_anchors` (A, 4) in whole pixels: sides are truncated, then corners rounded (halves to even)."""
    return base_anchors(1, [int(stride * scale) for scale in scales], ratios).round()
