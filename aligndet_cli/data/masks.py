"""Masks of labelled boxes, drawn when an image is used. Free of torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.errors import DataError

MIN_COORDINATES = 6  # three corners; pycocotools takes four numbers for a box


@dataclass(frozen=True)
class LabelMasks:
    """Masks of all labelled boxes without crowds, row for row as in `LabelBoxes`."""

    image_set: ImageSet

    def count(self, indices: list[int]) -> tuple[int, int]:
        """Return how many boxes of these images have a mask, and how many boxes they have."""
        rows = np.concatenate([np.arange(0), *(self._rows(index) for index in indices)]).astype(np.int64)
        segmentations = self.image_set.segmentations
        return 0 if segmentations is None else int((~segmentations.is_missing[rows]).sum()), len(rows)

    def masks_of(self, index: int, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
        """Draw the masks (N, H, W) bool of an image of that size; all False for a box without mask.

        Raises:
            DataError: a mask cannot be drawn.
        """
        rows = self._rows(index)
        masks = np.zeros((len(rows), *size_hw), dtype=np.bool_)
        for mask, row in zip(masks, rows, strict=True):
            if self.image_set.segmentations and (segmentation := self.image_set.segmentations[row]):
                mask[:] = draw_mask(segmentation, size_hw)
        return masks

    def _rows(self, index: int) -> NDArray[np.int64]:
        rows = np.arange(*self.image_set.offsets[index : index + 2])
        return rows[~self.image_set.is_crowd[rows]]


def draw_mask(segmentation: Any, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw a COCO segmentation (polygons, or a run-length code, compressed or not) as a mask (H, W) bool.

    Raises:
        DataError: it is neither, or of another size than the image.
    """
    height, width = size_hw
    try:
        if isinstance(segmentation, dict):
            if tuple(segmentation["size"]) != size_hw:
                raise DataError(f"a mask is {segmentation['size']} (height, width) but its image {list(size_hw)}")
            is_plain = isinstance(segmentation["counts"], list)
            code = coco_mask.frPyObjects(segmentation, height, width) if is_plain else segmentation
        else:
            polygons = [[float(value) for value in polygon] for polygon in segmentation]
            polygons = [polygon for polygon in polygons if len(polygon) >= MIN_COORDINATES and len(polygon) % 2 == 0]
            if not polygons:
                return np.zeros(size_hw, dtype=np.bool_)
            code = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return np.asarray(coco_mask.decode(code), dtype=np.bool_)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"a mask is neither polygons nor a run-length code ({error})") from None
