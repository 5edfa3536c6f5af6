"""The steps that are tried before a run, to see how much memory they need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from aligndet_cli.data.sample import Sample
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.loop import Learner, LoopSettings

# `Trial.gaps`, measured up to 3.1 and 1.55 with RetinaNet, reached within 40 steps (glibc 2.36).
GAPS_IN_PRETRAINING, GAPS_IN_FINETUNING = 3.0, 2.0


@dataclass(frozen=True)
class Trial:
    """A model, settings and samples of the most demanding kind for steps before the run. Picklable.

    Attributes:
        build: makes what the stage would train, on the device of a process; it is thrown away afterwards.
        sizes_hw: see `worst_sizes`.
        num_boxes: largest number of boxes of an image.
        num_images: in the whole run.
        gaps: factor on the memory that images need on a CPU where freed memory is kept (see `keep_freed_memory`):
            blocks of changing sizes leave gaps that later ones do not fit into.
        pools_regions: the detector has a second stage, whose memory does not depend on the size of images.
        semantic_classes: classes of pixels of the samples; 0: they have none.
    """

    build: Callable[[Process], Learner]
    settings: LoopSettings
    sizes_hw: Sequence[tuple[int, int]]
    num_boxes: int
    num_classes: int
    num_images: int
    gaps: float
    pools_regions: bool
    with_masks: bool = False
    semantic_classes: int = 0

    @property
    def largest(self) -> str:
        """Height and width of the largest images, for messages."""
        return "x".join(map(str, self.sizes_hw[0]))

    def draw(self, count: int, sizes_hw: Sequence[tuple[int, int]] | None = None) -> list[Sample]:
        """Draw samples of these sizes, by default of the largest."""
        sizes_hw = sizes_hw or self.sizes_hw
        samples = draw_samples(
            count, sizes_hw, num_boxes=self.num_boxes, num_classes=self.num_classes, with_masks=self.with_masks
        )
        return (
            [_with_classes(sample, self.semantic_classes) for sample in samples] if self.semantic_classes else samples
        )

    def draw_small(self) -> list[Sample]:
        """Draw a strip as wide as the largest image, so that it is not enlarged, and a twentieth as high."""
        height, width = self.sizes_hw[0]
        return self.draw(1, [(max(height // 20, 1), width)])


def draw_samples(
    count: int, sizes_hw: Sequence[tuple[int, int]], *, num_boxes: int, num_classes: int, with_masks: bool = False
) -> list[Sample]:
    """Draw seeded images of noise, with boxes whose sides are a twentieth to a third of the image's.

    Args:
        count: number of images.
        sizes_hw: heights and widths in pixels, taken in turns.
        num_boxes: boxes of each image.
        num_classes: K.
        with_masks: add masks that fill the left half of each box.
    """
    generator = torch.Generator().manual_seed(0)
    samples = []
    for position in range(count):
        height, width = sizes_hw[position % len(sizes_hw)]
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        limits = torch.tensor([width, height])
        sides = limits * (0.05 + 0.28 * torch.rand(num_boxes, 2, generator=generator))
        corners = (limits - sides) * torch.rand(num_boxes, 2, generator=generator)
        boxes = torch.cat([corners, corners + sides], dim=1)
        class_ids = torch.randint(num_classes, (num_boxes,), generator=generator)
        masks = _left_halves(boxes, (height, width)) if with_masks else None
        samples.append(Sample(position, position, image, boxes, class_ids, masks))
    return samples


def worst_sizes(short_sides: Sequence[int], long_side: int) -> list[tuple[int, int]]:
    """Return (height, width) of a landscape and a portrait image of the largest resolution, which make the worst batch.

    A batch is as high as its highest image and as wide as its widest.
    """
    short = min(max(short_sides), long_side)
    return [(short, long_side), (long_side, short)]


def striped_classes(size_hw: tuple[int, int], num_classes: int) -> NDArray[np.uint8]:
    """Return (H, W) classes of pixels, by their row."""
    height, width = size_hw
    return (np.arange(height) % num_classes).astype(np.uint8)[:, None].repeat(width, axis=1)


def _with_classes(sample: Sample, num_classes: int) -> Sample:
    return replace(sample, pixel_classes=torch.from_numpy(striped_classes(sample.size_hw, num_classes)))


def _left_halves(boxes: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    masks = torch.zeros(len(boxes), *size_hw, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1 : (x1 + x2) // 2] = True
    return masks
