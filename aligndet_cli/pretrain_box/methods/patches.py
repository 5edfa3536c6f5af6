"""Boxes cut out of images as small squares, and their features in a frozen network, for UP-DETR and DETReg.

Source: dddzg/up-detr and amirbar/DETReg `datasets/selfdet.py`. Their blur is in pixels of the patch, ours scales with
its side (docs/differences.md 57).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.crops import CropParams, ViewRecipe, draw_crop, make_views
from aligndet_cli.data.sample import Sample

SIDE = 128  # of a patch in pixels
CHANGES = ViewRecipe(1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter_p=0.8, gray_p=0.2, blur_p=0.5)
NUMBER = 3  # in the seeds of patches: views have 1 and 2


def draw_patch(seed: tuple[int, ...], box: Sequence[float], size_hw: tuple[int, int]) -> CropParams:
    """Draw the random colours of a patch, which is a box (x1, y1, x2, y2), grown to whole pixels of the image."""
    height, width = size_hw
    left, top = (min(int(corner), side - 1) for corner, side in zip(box[:2], (width, height), strict=True))
    right, bottom = (min(-int(-corner // 1), side) for corner, side in zip(box[2:], (width, height), strict=True))
    place = top, left, max(bottom - top, 1), max(right - left, 1)
    return replace(draw_crop(seed, size_hw, SIDE, CHANGES), box=place, flip=False)


def cut_patches(samples: Sequence[Sample], seed: int, device: torch.device) -> Tensor:
    """Return all boxes of B samples as normalised patches (N, 3, 128, 128) on the device, image after image."""
    sources, params = [], []
    for sample in samples:
        on_device = replace(sample, image=sample.image.to(device, non_blocking=True))  # once for all of its patches
        for number, box in enumerate(sample.boxes.tolist()):
            sources.append(on_device)
            params.append(draw_patch((seed, sample.position, NUMBER, number), box, sample.size_hw))
    return make_views(sources, params, SIDE, device) if sources else torch.zeros(0, 3, SIDE, SIDE, device=device)


@torch.no_grad()
def embed_patches(network: Backbone, level: str, patches: Tensor) -> Tensor:
    """Return the (N, C) float32 means of the network's map of a level, from (N, 3, SIDE, SIDE) patches."""
    if not len(patches):
        return patches.new_zeros(0, network.channels[level])
    maps: dict[str, Tensor] = network(patches)
    return maps[level].float().mean(dim=(2, 3))


def build_mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    """Build two linear layers with a ReLU between them; the hidden one is as wide as the input."""
    return nn.Sequential(nn.Linear(in_dim, in_dim), nn.ReLU(), nn.Linear(in_dim, out_dim))


def variety_of(found: Tensor, wanted: Tensor) -> Tensor:
    """Return a scalar: how much predictions (N, C) differ from each other, as a share of what targets (N, C) do."""
    if len(found) < 2:
        return found.new_ones(())
    return found.detach().std(dim=0).mean() / wanted.std(dim=0).mean().clamp(min=1e-12)
