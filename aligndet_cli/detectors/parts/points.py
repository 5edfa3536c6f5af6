"""Points on a pyramid's grid, and the boxes they are matched to.

The points of one image are one list: levels from fine to coarse, then rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aligndet_cli.detectors.parts.anchors import SizeHW
from aligndet_cli.detectors.parts.matching import BACKGROUND, image_groups, pad_boxes, rank_by_number

BOXES_AT_ONCE = {"cpu": 32, "cuda": 256}  # bounds the distances: 32 boxes x 22,000 points = 2.8 MB each


class PointGrid(nn.Module):
    """The middle of each cell of a pyramid.

    Source: mmdetection `MlvlPointGenerator`, offset 0.5. torchvision's points are the cells' top left corners.

    Args:
        strides: pixels per cell of each level.
        ranges: per level, smallest and largest distance to a box's farthest side, in pixels, both included.
    """

    def __init__(self, strides: Sequence[int], ranges: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.ranges: Tensor
        self.register_buffer("ranges", torch.tensor(ranges), persistent=False)  # (L, 2)

    def forward(self, grids_hw: Sequence[SizeHW]) -> Tensor:
        """Return (P, 2) x and y of all points, in pixels, float32.

        Args:
            grids_hw: rows and columns of each level.
        """
        levels = []
        for stride, (rows, columns) in zip(self.strides, grids_hw, strict=True):
            y = (torch.arange(rows, device=self.ranges.device) + 0.5) * stride
            x = (torch.arange(columns, device=self.ranges.device) + 0.5) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            levels.append(torch.stack([x, y], dim=-1).view(-1, 2))
        return torch.cat(levels)

    def ranges_of(self, grids_hw: Sequence[SizeHW]) -> Tensor:
        """Return the (P, 2) range of every point's level."""
        counts = [rows * columns for rows, columns in grids_hw]
        return torch.cat([of_level.expand(count, 2) for of_level, count in zip(self.ranges, counts, strict=True)])


def measure_sides(points: Tensor, boxes: Tensor) -> Tensor:
    """Return (..., 4) distances in pixels to the left, top, right and bottom side; negative outside of the box.

    Args:
        points: (..., 2) x and y.
        boxes: (..., 4) xyxy; leading dimensions broadcast.
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


@torch.no_grad()
def match_by_range(points: Tensor, ranges: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Match each point to the smallest box around it that is in the point's range, on ties to the first one.

    Source: mmdetection `FCOSHead.get_targets`, without centre sampling. torchvision's ranges are 0..8 and 4..8
    strides, their ends are not included, and it samples the centre only.

    Args:
        points: (P, 2) x and y in pixels.
        ranges: (P, 2) smallest and largest distance to a box's farthest side, both included.
        boxes: (N, 4) xyxy float32 of each image.

    Returns:
        (B, P) int64: index of the box in its image or `BACKGROUND`.
    """
    x, y = points.unbind(dim=1)
    low, high = ranges.unbind(dim=1)
    matched = []
    for group in image_groups(len(boxes), points.device):
        ranked = rank_by_number(boxes[group], points.device)
        padded, _ = pad_boxes(ranked.boxes)  # what is filled up has no point in it
        smallest_area = points.new_full((len(padded), len(points)), torch.inf)
        found = torch.full_like(smallest_area, BACKGROUND, dtype=torch.int64)
        for first, some in ranked.chunks(BOXES_AT_ONCE[points.device.type]):
            left, top, right, bottom = padded[first, some, :, None].unbind(dim=2)  # (b, n, 1) each
            to_left, to_right, to_top, to_bottom = x - left, right - x, y - top, bottom - y  # (b, n, P) each
            nearest = torch.minimum(torch.minimum(to_left, to_right), torch.minimum(to_top, to_bottom))
            farthest = torch.maximum(torch.maximum(to_left, to_right), torch.maximum(to_top, to_bottom))
            is_in = (nearest > 0) & (farthest >= low) & (farthest <= high)
            area = torch.where(is_in, (right - left) * (bottom - top), torch.inf)
            area, box = area.min(dim=1)
            known_area, known_box = smallest_area[first], found[first]  # changed in place
            is_smaller = area < known_area
            torch.where(is_smaller, area, known_area, out=known_area)
            torch.where(is_smaller, box + some.start, known_box, out=known_box)
        matched.append(found[ranked.back])
    return torch.cat(matched)
