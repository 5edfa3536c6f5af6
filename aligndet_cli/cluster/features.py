"""Backbone features of every proposal, one row per box, written to disk batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import roi_align

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.cluster.config import ClusterConfig
from aligndet_cli.cluster.rows import DoneMarks, RowFile, Watch
from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.data.dataset import ImageSet, positions_of
from aligndet_cli.data.loaders import evaluation_batches, resolve_workers
from aligndet_cli.errors import RunError
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.placement import autocast

# The mean over 14 x 14 points equals the mean over the usual 7 x 7 RoIAlign with 2 x 2 points per bin, at a fiftieth of
# its memory.
_POINTS_PER_SIDE = 14
# A CPU runs so many pixels of a batch through the backbone at a time, four of the default images: the same features but
# for rounding, as fast, and in a fraction of the memory. A GPU takes the whole batch.
_CPU_PIXELS = 4 * 800 * 1344


@dataclass(frozen=True)
class ProposalImages:
    """Images with proposals, in the order of the store, in fixed batches.

    Attributes:
        places: (images, 2) int64, position of each image with proposals in the store and in the data set.
        batch_size: images per batch. It changes the features, since an image's padding depends on its batch.
    """

    images: ImageSet
    store: ProposalStore
    places: NDArray[np.int64]
    batch_size: int

    @property
    def num_batches(self) -> int:
        """Number of batches, of which the last may be smaller."""
        return -(-len(self.places) // self.batch_size)

    def batch(self, index: int) -> NDArray[np.int64]:
        """Return the (B, 2) places of a batch."""
        return self.places[index * self.batch_size : (index + 1) * self.batch_size]

    def rows_of(self, index: int) -> tuple[int, int]:
        """Return the first row of a batch among the boxes of the store, and the row behind its last."""
        batch = self.batch(index)
        return int(self.store.offsets[batch[0, 0]]), int(self.store.offsets[batch[-1, 0] + 1])


def find_places(store: ProposalStore, images: ImageSet) -> NDArray[np.int64]:
    """Return the places of images with proposals in store and data set, see `ProposalImages`."""
    with_boxes = np.flatnonzero(store.counts)
    in_images = positions_of(store.image_ids[with_boxes], images.image_ids)
    assert (in_images >= 0).all(), "proposals of images that are not in the data they were made from"
    return np.stack([with_boxes, in_images], axis=1)


def write_features(
    backbone: nn.Module,
    source: ProposalImages,
    features: RowFile,
    marks: DoneMarks,
    config: ClusterConfig,
    process: Process,
    watch: Watch,
) -> None:
    """Write one row per proposal to `features`; batches that are marked as done are skipped.

    Each process takes every `world_size`-th batch. A row depends only on its batch, so neither the number of
    processes nor interruptions change it.

    Args:
        backbone: on the process's device, in eval mode; returns maps by level.
        features: (M, C) float16 rows, in the order of the store.

    Raises:
        RunError: the features are not finite numbers.
        DataError: an image cannot be read.
    """
    mine = range(process.rank, source.num_batches, process.world_size)
    is_done = marks.read()
    watch.resumed(sum(len(source.batch(index)) for index in mine if is_done[index]))
    todo = [index for index in mine if not is_done[index]]
    batches = evaluation_batches(
        source.images,
        # Only the last of all batches can be short, and it is last here too, so the loader makes the same batches.
        indices=[int(position) for index in todo for position in source.batch(index)[:, 1]],
        batch_size=source.batch_size,
        resolution=(config.short_side, config.long_side),
        num_workers=resolve_workers(config.runtime.num_workers, process),
        device=torch.device(process.device),
    )
    for index, (positions, images, sizes_hw) in zip(todo, batches, strict=True):
        boxes_per_image = [
            scale_boxes(source.store.boxes_of(int(in_store)), size_hw, resized_hw)
            for in_store, size_hw, resized_hw in zip(source.batch(index)[:, 0], sizes_hw, images.sizes_hw, strict=True)
        ]
        features.write(source.rows_of(index)[0], _rows_of(backbone, images, boxes_per_image, config))
        marks.mark(index)
        watch.finished(len(positions))


def pool_boxes(feature_map: Tensor, boxes_per_image: Sequence[Tensor], batch_hw: tuple[int, int]) -> Tensor:
    """Return the average of a feature map inside each box (RoIAlign with `aligned=True`): (sum of N, C).

    Args:
        feature_map: (B, C, H, W).
        boxes_per_image: (N, 4) xyxy of each image, in pixels of the padded batch.
        batch_hw: height and width of the padded batch in pixels.
    """
    scale = feature_map.shape[-2] / batch_hw[0]
    pooled = roi_align(
        feature_map, list(boxes_per_image), 1, spatial_scale=scale, sampling_ratio=_POINTS_PER_SIDE, aligned=True
    )
    return pooled.flatten(1)  # (N, C, 1, 1) -> (N, C)


def scale_boxes(boxes: NDArray[np.float32], size_hw: tuple[int, int], resized_hw: tuple[int, int]) -> Tensor:
    """Return (N, 4) xyxy boxes of an image in pixels of the resized image."""
    scale_y, scale_x = (new / old for new, old in zip(resized_hw, size_hw, strict=True))
    return torch.from_numpy(boxes.copy()) * torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float32)


@torch.inference_mode()
def _rows_of(
    backbone: nn.Module, images: ImageBatch, boxes_per_image: Sequence[Tensor], config: ClusterConfig
) -> NDArray[np.float16]:
    """Return the (N, C) features of all boxes of a batch; arguments as in `pool_boxes`."""
    device, batch_hw = images.pixels.device, (images.pixels.shape[-2], images.pixels.shape[-1])
    pixels = images.pixels.contiguous(memory_format=torch.channels_last)
    at_once = max(1, _CPU_PIXELS // (batch_hw[0] * batch_hw[1])) if device.type == "cpu" else len(pixels)
    with autocast(device, config.runtime.precision):
        feature_map = torch.cat([backbone(some)[config.level] for some in pixels.split(at_once)])
    boxes_per_image = [boxes.to(device) for boxes in boxes_per_image]
    rows = pool_boxes(feature_map.float(), boxes_per_image, batch_hw).to(torch.float16)
    if not torch.isfinite(rows).all():
        raise RunError(
            "cluster: the backbone's features are not finite numbers in float16; "
            "check --backbone-weights, or use --set runtime.precision=32-true"
        )
    return rows.cpu().numpy()
