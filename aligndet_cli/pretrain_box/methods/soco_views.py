"""The three views of SoCo, the boxes in them, and the levels of the pyramid that these belong to.

Source: Wei et al., NeurIPS 2021, §3.2, and hologerry/SoCo `contrast/data/{dataset,transform,bboxs_utils}.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aligndet_cli.data.crops import CropParams, ViewRecipe, draw_crop, make_views
from aligndet_cli.data.sample import Sample, mix_seed
from aligndet_cli.detectors.parts.roi_head import to_rois

NUM_BOXES = 4  # K, of an image in a pair of views
MIN_COMMON = 2  # boxes in a view; with fewer, the crop is drawn again
MAX_DRAWS = 5
JITTER = 0.1  # of a box's place and size in the first view, as a share of its size; of half of the boxes
LARGEST_SIDES = (48.0, 96.0, 192.0)  # of boxes on P2, P3 and P4, in pixels of the view; larger ones are on P5
_COLOURS = ViewRecipe(min_area=0.5, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_p=0.8, gray_p=0.2)
WHOLE = replace(_COLOURS, blur_p=1.0)
PART = replace(_COLOURS, blur_p=0.1, solarize_p=0.2)


@dataclass(frozen=True)
class PlacedView:
    """One view of B images, with n boxes in each.

    Attributes:
        pixels: (B, 3, S, S) normalised.
        rois: (B * n, 5) image number, and xyxy in pixels of the view.
        ids: (B, n) int64 rows of the boxes among those of their image; below 0 for places without a box.
        params: of each image.
    """

    pixels: Tensor
    rois: Tensor
    ids: Tensor
    params: Sequence[CropParams]


def draw_three_views(samples: Sequence[Sample], side: int, seed: int, device: torch.device) -> list[PlacedView]:
    """Draw the views of B samples: the whole image, a part of it, and another part in half the size.

    The first view has 2 K boxes of each image, those that it shares with the second view and then with the third one;
    these have K.
    """
    drawn = [_draw_one(sample, side, seed) for sample in samples]
    views = []
    for number in range(3):
        size = side if number < 2 else side // 2
        params = [of_image[number].params for of_image in drawn]
        boxes = [of_image[number].boxes for of_image in drawn]
        ids = torch.stack([of_image[number].ids for of_image in drawn])
        pixels = make_views(samples, params, size, device)
        rois = to_rois(boxes).to(device, non_blocking=True)
        views.append(PlacedView(pixels, rois, ids.to(device, non_blocking=True), params))
    return views


@dataclass(frozen=True)
class _Drawn:
    """One view of an image: (n, 4) xyxy boxes in its pixels, and their (n,) int64 ids."""

    params: CropParams
    boxes: Tensor
    ids: Tensor


def _draw_one(sample: Sample, side: int, seed: int) -> list[_Drawn]:
    place = seed, sample.position
    height, width = sample.size_hw
    whole = replace(draw_crop((*place, 1), sample.size_hw, side, WHOLE), box=(0, 0, height, width))
    generator = torch.Generator().manual_seed(mix_seed(*place, 0))
    firsts, ids_of_first, parts = [], [], []
    for number, size in ((2, side), (3, side // 2)):
        for attempt in range(MAX_DRAWS):
            params = draw_crop((*place, number, attempt), sample.size_hw, size, PART)
            common = common_boxes(sample.boxes, params)
            if len(common) >= MIN_COMMON:
                break
        chosen = choose_boxes(common, generator)
        boxes = _fill(sample.boxes, chosen, sample.size_hw)
        firsts.append(place_boxes(jitter_boxes(boxes, sample.size_hw, generator), whole, side))
        ids_of_first.append(torch.where(chosen >= 0, chosen, -1))
        parts.append(_Drawn(params, place_boxes(boxes, params, size), torch.where(chosen >= 0, chosen, -number)))
    return [_Drawn(whole, torch.cat(firsts), torch.cat(ids_of_first)), *parts]


def common_boxes(boxes: Tensor, params: CropParams) -> Tensor:
    """Return the (M,) int64 rows of (N, 4) xyxy boxes that overlap a crop."""
    top, left, height, width = params.box
    inside = (boxes[:, 0] < left + width) & (boxes[:, 2] > left) & (boxes[:, 1] < top + height) & (boxes[:, 3] > top)
    return inside.nonzero()[:, 0]


def choose_boxes(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (K,) of (M,) int64 rows; fewer than K are repeated, and without any all are -1."""
    if not len(rows):
        return torch.full((NUM_BOXES,), -1)
    drawn = rows[torch.randperm(len(rows), generator=generator)]
    return drawn[torch.arange(NUM_BOXES) % len(drawn)]


def _fill(boxes: Tensor, chosen: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return the (K, 4) chosen boxes, and the whole image where there is none."""
    height, width = size_hw
    whole = torch.tensor([0.0, 0.0, width, height]).expand(len(chosen), 4)
    return torch.where(chosen[:, None] >= 0, boxes[chosen], whole) if len(boxes) else whole


def jitter_boxes(boxes: Tensor, size_hw: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Move and resize half of (K, 4) xyxy boxes at random, by up to `JITTER` of their size; they stay in the image."""
    draws = torch.rand(len(boxes), 5, generator=generator)
    corners, sizes = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    shifts = (2 * draws[:, 1:] - 1) * JITTER * sizes.repeat(1, 2)  # (K, 4) of x, y, w, h
    corners, sizes = corners + shifts[:, :2], sizes + shifts[:, 2:]
    moved = torch.cat([corners, corners + sizes], dim=1)
    moved = moved.clamp(min=0).minimum(torch.tensor([size_hw[1], size_hw[0]] * 2))
    return torch.where(draws[:, :1] < 0.5, moved, boxes)


def place_boxes(boxes: Tensor, params: CropParams, side: int) -> Tensor:
    """Return (N, 4) xyxy boxes of an image in the pixels of its view; they end at its border."""
    top, left, height, width = params.box
    origin, scale = torch.tensor([left, top] * 2), torch.tensor([side / width, side / height] * 2)
    placed = ((boxes - origin) * scale).clamp(0, side)
    if params.flip:
        placed = torch.stack([side - placed[:, 2], placed[:, 1], side - placed[:, 0], placed[:, 3]], dim=1)
    return placed


def level_of_sides(rois: Tensor) -> Tensor:
    """Return (S,) int64: the level, 0 for P2 to 3 for P5, of (S, 5) RoIs by the square root of their area."""
    sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    return torch.bucketize(sides, sides.new_tensor(LARGEST_SIDES))
