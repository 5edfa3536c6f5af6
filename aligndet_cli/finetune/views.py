"""From labelled samples to the losses of a detector, on the training device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from aligndet_cli.config import Frozen, Side
from aligndet_cli.data.sample import Sample, mix_seed
from aligndet_cli.data.transforms import Crop, ViewParams, crop_sample, draw_view, make_batch
from aligndet_cli.detectors import AnyDetector
from aligndet_cli.training.recipe import SINGLE_SCALE, WIDE_SIDES, PolicyName
from aligndet_cli.training.trial import worst_sizes

DETR_SHORT_SIDES, DETR_CROP = (400, 500, 600), (384, 600)  # of the image that is cropped, and limits of the crop
JITTER, JITTER_SIDE = (0.1, 2.0), 1024  # long side of the image by side of the square; that side


class ResolutionConfig(Frozen):
    """Training resolution; the test resolution is its largest short side. None: by recipe and data."""

    # detr crops half of the images before it resizes them.
    policy: Annotated[PolicyName | None, BeforeValidator(lambda value: None if value == "auto" else value)] = Field(
        None, description="Resizing in training; detr also crops, lsj jitters the scale (by recipe)."
    )
    short_side: Annotated[tuple[Side, ...], Field(min_length=1)] | None = Field(
        None, description="Short sides in pixels, one of which is drawn; tested at the largest (by recipe)."
    )
    long_side: Side = Field(1333, description="Largest long side in pixels.")
    jitter_side: Side | None = Field(None, description="Side in pixels of the squares that lsj trains on (1024).")


@dataclass(frozen=True)
class Resolution:
    """How fine-tuning resizes and crops, with nothing left open; fields as in `ResolutionConfig`."""

    policy: PolicyName
    short_sides: tuple[int, ...]
    long_side: int
    jitter_side: int

    @property
    def at_test(self) -> tuple[int, int]:
        """Short and long side that the detector is to be tested at."""
        return max(self.short_sides), self.long_side

    @property
    def padded_side(self) -> int:
        """Side that batches are padded to at least."""
        return self.jitter_side if self.policy == "lsj" else 0

    def worst_sizes(self) -> list[tuple[int, int]]:
        """Heights and widths of images that together make the largest batch there is."""
        if self.policy == "lsj":
            return [(self.jitter_side, self.jitter_side)]
        return worst_sizes(self.short_sides, self.long_side)

    def describe(self) -> str:
        """For people."""
        sides = f"short side {list(self.short_sides)}, long side {self.long_side}"
        if self.policy == "lsj":
            jitter = f"large-scale jitter {JITTER[0]:g} to {JITTER[1]:g} on squares of {self.jitter_side}"
            return f"{jitter}; tested at short side {max(self.short_sides)}, long side {self.long_side}"
        return f"{sides}, half of the images cropped before" if self.policy == "detr" else sides


def resolve_resolution(config: ResolutionConfig, policy: PolicyName, scales: tuple[int, ...]) -> Resolution:
    """What was asked for, else the policy of the recipe and these short sides (those of DETR for its policy)."""
    policy = config.policy or policy
    default = {"resize": scales, "detr": WIDE_SIDES, "lsj": SINGLE_SCALE}[policy]
    return Resolution(policy, config.short_side or default, config.long_side, config.jitter_side or JITTER_SIDE)


class LabelledViews(nn.Module):
    """Draws one view of every sample, without colour changes, and runs the detector on it."""

    def __init__(self, model: AnyDetector, *, resolution: Resolution, seed: int) -> None:
        super().__init__()
        self.model, self.resolution, self.seed = model, resolution, seed
        self.train()

    def forward(self, samples: Sequence[Sample], _step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of one batch; nothing beside them is shown."""
        device = next(self.model.parameters()).device
        params, cropped = [], []
        for sample in samples:
            crop, view = draw_labelled_view((self.seed, sample.position), _size_of(sample), self.resolution)
            params.append(view)
            cropped.append(sample if crop is None else crop_sample(sample, crop, device))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, targets = make_batch(cropped, params, device, padded_side=self.resolution.padded_side)
        return self.model(images, targets), {}


def draw_labelled_view(
    seed: tuple[int, int], size_hw: tuple[int, int], resolution: Resolution
) -> tuple[Crop | None, ViewParams]:
    """What is cut out of an image, if anything, and what is then done to it; depends on its arguments alone."""
    generator = torch.Generator().manual_seed(mix_seed(*seed, 1))
    draws = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    if resolution.policy == "lsj":
        return _jitter(seed, size_hw, resolution.jitter_side, draws)
    view = draw_view((*seed, 0), resolution.short_sides, resolution.long_side, with_colour=False)
    is_cropped = resolution.policy == "detr" and draws[0] < 0.5
    return _detr_crop(size_hw, draws[1:]) if is_cropped else None, view


def _detr_crop(size_hw: tuple[int, int], draws: Sequence[float]) -> Crop:
    """A crop of DETR: the image is resized, height and width of the crop are drawn, and where it lies.

    Source: facebookresearch/detr `make_coco_transforms`; mmdetection `detr_r50`. Here the image is not resized before
    it is cropped: the crop is made in its own pixels, and resized once.
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
    """Large-scale jitter: the image is resized to 0.1 to 2.0 times the square, and what is more than that cut off.

    Source: Ghiasi et al., CVPR 2021; mmdetection's `lsj` configs, whose `recompute_bbox` we leave out: boxes are cut,
    not drawn anew around what is left of their masks.
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


def _size_of(sample: Sample) -> tuple[int, int]:
    height, width = sample.image.shape[-2:]
    return int(height), int(width)
