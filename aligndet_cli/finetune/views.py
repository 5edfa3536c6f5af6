"""From labelled samples to views, and to the losses of a detector, on the training device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.config import Frozen, Side
from aligndet_cli.data.sample import Sample, mix_seed
from aligndet_cli.data.sides import Sides, show_limits
from aligndet_cli.data.transforms import Crop, ViewParams, crop_sample, draw_view, make_batch
from aligndet_cli.detectors import Detector, DetectorConfig
from aligndet_cli.training.learner import ViewLosses
from aligndet_cli.training.recipe import SINGLE_SCALE, WIDE_SIDES, PolicyName
from aligndet_cli.training.trial import worst_sizes

DETR_SHORT_SIDES, DETR_CROP = (400, 500, 600), (384, 600)  # short sides before the crop, limits of the crop's sides
JITTER, JITTER_SIDE = (0.1, 2.0), 1024  # long side of the image by side of the square, side of the square


class ResolutionConfig(Frozen):
    """Training resolution; the test resolution is its largest short side. None: by recipe and data."""

    # detr crops half of the images before it resizes them.
    policy: Annotated[PolicyName | None, BeforeValidator(lambda value: None if value == "auto" else value)] = Field(
        None, description="Resizing in training; detr also crops, lsj jitters the scale (by recipe)."
    )
    short_side: Sides | None = Field(
        None, description="Short sides in pixels (or 400..1400), one is drawn; tested at the largest (by recipe)."
    )
    long_side: Side = Field(1333, description="Largest long side in pixels.")
    jitter_side: Side | None = Field(None, description="Side in pixels of the squares that lsj trains on (1024).")


@dataclass(frozen=True)
class Resolution:
    """Resolved resolution of fine-tuning; fields as in `ResolutionConfig`."""

    policy: PolicyName
    short_sides: tuple[int, ...]
    long_side: int
    jitter_side: int

    @property
    def at_test(self) -> tuple[int, int]:
        """Short and long side of images in tests."""
        return max(self.short_sides), self.long_side

    @property
    def padded_side(self) -> int:
        """Least side of padded batches."""
        return self.jitter_side if self.policy == "lsj" else 0

    def worst_sizes(self) -> list[tuple[int, int]]:
        """Return heights and widths of images that together make the largest possible batch."""
        if self.policy == "lsj":
            return [(self.jitter_side, self.jitter_side)]
        return worst_sizes(self.short_sides, self.long_side)

    def describe(self) -> str:
        """Return the resolution in words."""
        sides = show_limits(self.short_sides, self.long_side)
        if self.policy == "lsj":
            jitter = f"large-scale jitter {JITTER[0]:g} to {JITTER[1]:g} on squares of {self.jitter_side}"
            return f"{jitter}; tested at short side {max(self.short_sides)}, long side {self.long_side}"
        return f"{sides}, half of the images cropped before" if self.policy == "detr" else sides


def resolve_resolution(config: ResolutionConfig, policy: PolicyName, scales: tuple[int, ...]) -> Resolution:
    """Return the resolution asked for; by default `policy`, and `scales` as short sides if it is `resize`."""
    policy = config.policy or policy
    default = {"resize": scales, "detr": WIDE_SIDES, "lsj": SINGLE_SCALE}[policy]
    return Resolution(policy, config.short_side or default, config.long_side, config.jitter_side or JITTER_SIDE)


class LabelledViews(ViewLosses):
    """One view of every sample, without colour changes, and the losses of a detector on it."""

    def __init__(self, model: Detector, *, resolution: Resolution, seed: int) -> None:
        super().__init__()
        self.model, self.resolution, self.seed = model, resolution, seed
        self.largest_hw = resolution.worst_sizes()[0]
        self.train()

    def layers(self) -> Sequence[Sequence[nn.Module]]:
        """Return the layers of the detector's backbone."""
        return self.model.backbone.layers()

    def forward(self, samples: Sequence[Sample], _step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scalar losses of B samples by name; nothing else is logged."""
        device = next(self.model.parameters()).device
        params, cropped = [], []
        for sample in samples:
            crop, view = draw_labelled_view((self.seed, sample.position), sample.size_hw, self.resolution)
            params.append(view)
            cropped.append(sample if crop is None else crop_sample(sample, crop, device))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, targets = make_batch(cropped, params, device, padded_side=self.resolution.padded_side)
        return self.model(images, targets), {}


def build_views(
    detector: DetectorConfig, backbone: BackboneConfig, num_classes: int, resolution: Resolution, seed: int
) -> LabelledViews:
    """Return the module that the loop trains, on the CPU, with random weights."""
    model = detector.build(build_backbone(backbone), num_classes)
    return LabelledViews(model, resolution=resolution, seed=seed)


def draw_labelled_view(
    seed: tuple[int, int], size_hw: tuple[int, int], resolution: Resolution
) -> tuple[Crop | None, ViewParams]:
    """Draw the crop of an image, if any, and the parameters of the view of it; they depend on the arguments alone."""
    generator = torch.Generator().manual_seed(mix_seed(*seed, 1))
    draws = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    if resolution.policy == "lsj":
        return _jitter(seed, size_hw, resolution.jitter_side, draws)
    view = draw_view((*seed, 0), resolution.short_sides, resolution.long_side, with_colour=False)
    is_cropped = resolution.policy == "detr" and draws[0] < 0.5
    return _detr_crop(size_hw, draws[1:]) if is_cropped else None, view


def _detr_crop(size_hw: tuple[int, int], draws: Sequence[float]) -> Crop:
    """Draw short side of the image, height and width of the crop, and its position, as DETR does.

    Source: facebookresearch/detr `make_coco_transforms`; mmdetection `detr_r50`. They resize before and after the
    crop; we crop in the original pixels and resize once.
    """
    choice, *lengths, down, right = draws
    scale = DETR_SHORT_SIDES[int(choice * len(DETR_SHORT_SIDES))] / min(size_hw)
    sides = []
    for side, draw in zip(size_hw, lengths, strict=True):
        low, high = (min(limit / scale, side) for limit in DETR_CROP)
        sides.append(max(round(low + draw * (high - low)), 1))
    return _place(size_hw, (sides[0], sides[1]), (down, right))


def _jitter(
    seed: tuple[int, int], size_hw: tuple[int, int], square: int, draws: Sequence[float]
) -> tuple[Crop | None, ViewParams]:
    """Draw large-scale jitter: resize the image to 0.1 to 2.0 times the square, and crop it to the square.

    Source: Ghiasi et al., CVPR 2021; mmdetection's `lsj` configs. Unlike their `recompute_bbox`, we cut boxes at the
    border and do not fit them to the rest of their masks.
    """
    jittered = (JITTER[0] + draws[0] * (JITTER[1] - JITTER[0])) * square
    long_side = max(round(min(jittered, square)), 1)
    view = draw_view((*seed, 0), (long_side,), long_side, with_colour=False)
    if jittered <= square:
        return None, view
    limit = max(round(square / jittered * max(size_hw)), 1)
    height, width = (min(side, limit) for side in size_hw)
    return _place(size_hw, (height, width), (draws[1], draws[2])), view


def _place(size_hw: tuple[int, int], crop_hw: tuple[int, int], draws: tuple[float, float]) -> Crop:
    top, left = (int(draw * (side - part + 1)) for side, part, draw in zip(size_hw, crop_hw, draws, strict=True))
    return Crop(top, left, *crop_hw)
