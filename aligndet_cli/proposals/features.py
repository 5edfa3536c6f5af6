"""Order the boxes of a search by the features of a backbone, as a worker does it. Apart, since it needs torch."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity, grid_sample, pad

from aligndet_cli.backbones import Backbone, BackboneConfig, build_backbone, load_backbone_weights
from aligndet_cli.data.images import decode_reduced, read_bytes
from aligndet_cli.data.transforms import normalise
from aligndet_cli.proposals.cue import Cue
from aligndet_cli.proposals.journal import ImageResult
from aligndet_cli.proposals.work import Job, result_of

# Nothing is fitted. What was tried on which photos, and what it gave on others, is in examples/benchmarks.md.
_LEVELS = ("c3", "c4")  # parts and shapes; c2 sees edges, which the search has seen, and c5 is too coarse
_SURROUNDINGS = 2.0  # sides of the window that a box is compared with, in sides of the box
_SEARCH_WEIGHT = 2  # of the place in the order of the search; the place by the contrast at each level has 1
_NUM_PIXELS = 448 * 448  # that the backbone sees
_STRIDE = 32  # of the coarsest map


def find_boxes_with_cue(
    search: Callable[[Job], ImageResult], cue: Cue, max_per_image: int | None, job: Job
) -> ImageResult:
    """Return the boxes that a search finds, in an order that the backbone has a say in; never raises a DataError.

    An image is a batch of its own and one thread computes it, so that the bytes do not depend on who else works.

    Args:
        search: returns all boxes of an image that pass the filters, best first.
        max_per_image: number of boxes that are kept.
    """
    found = search(job)
    if found.reason or len(found.boxes) < 2:
        return found
    return result_of(job, functools.partial(_reordered, cue, found, max_per_image))


@torch.inference_mode()
def _reordered(cue: Cue, found: ImageResult, max_per_image: int | None, job: Job) -> ImageResult:
    torch.set_num_threads(1)
    image, size_hw = decode_reduced(read_bytes(job.path), job.path, _NUM_PIXELS)
    pixels = normalise(torch.from_numpy(_resized(image)).permute(2, 0, 1))
    maps = _backbone(cue.name, cue.weights, cue.content_hash)(pixels[None])
    shares = torch.from_numpy(found.boxes).double() / torch.tensor([size_hw[1], size_hw[0]] * 2)
    places = _SEARCH_WEIGHT * np.arange(len(found.boxes))
    for level in _LEVELS:
        contrast = contrast_to_surroundings(maps[level][0], shares).numpy()
        places[np.argsort(-contrast, kind="stable")] += np.arange(len(places))
    order = np.argsort(places, kind="stable")[:max_per_image]
    return replace(found, boxes=found.boxes[order])


def contrast_to_surroundings(features: Tensor, boxes: Tensor) -> Tensor:
    """Return (N,) float64, 0 to 2: 1 - cosine of the mean feature in a box and that in the window around it.

    Features are taken relative to their mean over the image, and each with the length of 1.

    Args:
        features: (C, H, W).
        boxes: (N, 4) float64 xyxy, as shares of the image's sides.
    """
    features = features.double()
    features = features - features.mean(dim=(1, 2), keepdim=True)
    features = features / features.norm(dim=0, keepdim=True).clamp(min=1e-6)
    sums = pad(features, (1, 0, 1, 0)).cumsum(dim=1).cumsum(dim=2)  # (C, H + 1, W + 1)
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    windows = torch.cat([centres - sides * (_SURROUNDINGS / 2), centres + sides * (_SURROUNDINGS / 2)], dim=1)
    inside = _sum_in(sums, boxes)
    # Of a cosine only the direction matters, so sums do for means.
    return 1 - cosine_similarity(inside, _sum_in(sums, windows.clamp(0, 1)) - inside, dim=1)


def _sum_in(sums: Tensor, boxes: Tensor) -> Tensor:
    """Return (N, C) sums in (N, 4) boxes; a cell that a side cuts counts by its share, as interpolation has it."""
    x1, y1, x2, y2 = (2 * boxes - 1).unbind(dim=1)  # -1 and 1 are the borders of the image
    corners = torch.stack([torch.stack(xy, dim=1) for xy in ((x2, y2), (x1, y2), (x2, y1), (x1, y1))])  # (4, N, 2)
    at = grid_sample(sums[None], corners[None], align_corners=True)[0].permute(1, 2, 0)  # (4, N, C)
    return at[0] - at[1] - at[2] + at[3]


def _resized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an (H, W, 3) image at about `_NUM_PIXELS`, with sides of whole cells of all maps."""
    height, width = image.shape[:2]
    scale = (_NUM_PIXELS / (height * width)) ** 0.5
    new_wh = [max(round(side * scale / _STRIDE), 1) * _STRIDE for side in (width, height)]
    return np.asarray(
        cv2.resize(image, new_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), dtype=np.uint8
    )


@functools.cache
def _backbone(name: str, weights: Path, _content_hash: str) -> Backbone:
    """Load a backbone once per process; a worker that lives on must not use one of before."""
    backbone = build_backbone(BackboneConfig.model_validate({"name": name}))
    load_backbone_weights(backbone, weights)
    return backbone.eval()
