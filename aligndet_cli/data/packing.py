"""Samples in a few blocks of memory, since passing, pinning and copying cost time per tensor, not per byte."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aligndet_cli.data.sample import Sample

_BLOCKS = ("pixels", "boxes", "class_ids", "masks")


@dataclass(frozen=True)
class _Head:
    """A sample without its tensors; fields as in `Sample`."""

    position: int
    index: int
    size_hw: tuple[int, int]
    num_boxes: int
    has_masks: bool
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PackedSamples:
    """The samples of a batch, with all tensors of a kind in one.

    Attributes:
        heads: one per sample.
        pixels: (bytes,) uint8 of all images.
        boxes: (N, 4) float32 xyxy of all samples.
        class_ids: (N,) int64.
        masks: (pixels,) bool of all samples with masks.
    """

    heads: tuple[_Head, ...]
    pixels: Tensor
    boxes: Tensor
    class_ids: Tensor
    masks: Tensor

    @staticmethod
    def of(samples: Sequence[Sample]) -> "PackedSamples":
        """Pack copies of the samples."""
        heads = tuple(
            _Head(
                sample.position,
                sample.index,
                (int(sample.image.shape[-2]), int(sample.image.shape[-1])),
                len(sample.boxes),
                sample.masks is not None,
                sample.skipped,
            )
            for sample in samples
        )
        masks = [sample.masks.reshape(-1) for sample in samples if sample.masks is not None]
        return PackedSamples(
            heads,
            pixels=torch.cat([sample.image.reshape(-1) for sample in samples]),
            boxes=torch.cat([sample.boxes for sample in samples]),
            class_ids=torch.cat([sample.class_ids for sample in samples]),
            masks=torch.cat(masks) if masks else torch.empty(0, dtype=torch.bool),
        )

    def pin_memory(self) -> "PackedSamples":
        """Return a copy in pinned memory; `DataLoader` calls this method by its name."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _BLOCKS})

    def unpack(self) -> list[Sample]:
        """Return the samples as views of the blocks."""
        areas = [head.size_hw[0] * head.size_hw[1] for head in self.heads]
        counts = [head.num_boxes for head in self.heads]
        mask_pixels = [head.num_boxes * area * head.has_masks for head, area in zip(self.heads, areas, strict=True)]
        parts = zip(
            self.heads,
            self.pixels.split([3 * area for area in areas]),
            self.boxes.split(counts),
            self.class_ids.split(counts),
            self.masks.split(mask_pixels),
            strict=True,
        )
        return [
            Sample(
                head.position,
                head.index,
                pixels.view(3, *head.size_hw),
                boxes,
                class_ids,
                masks.view(head.num_boxes, *head.size_hw) if head.has_masks else None,
                head.skipped,
            )
            for head, pixels, boxes, class_ids, masks in parts
        ]
