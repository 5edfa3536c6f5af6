"""Masks of labelled boxes, drawn when an image is used. Free of torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.mask_forms import form_of, misfit
from aligndet_cli.errors import DataError


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
    """Draw a COCO segmentation as a mask (H, W) bool, see `encode_mask`.

    Raises:
        DataError: it cannot be drawn.
    """
    return np.asarray(coco_mask.decode(encode_mask(segmentation, size_hw)), dtype=np.bool_)


def encode_mask(segmentation: Any, size_hw: tuple[int, int]) -> dict[str, Any]:
    """Return the run-length code of a COCO segmentation.

    This is the one way from labels to pycocotools, whose C code checks nothing: a coordinate that is NaN or 1e9 takes
    all memory of the machine, and a code that is too long is written beyond its mask.

    Args:
        segmentation: polygons, also a single one as a flat list, or a run-length code, compressed or not.

    Raises:
        DataError: none of these, of another size than the image, or with numbers that mean no place in it.
    """
    content = check_segmentation(segmentation, size_hw)
    if isinstance(content, list):
        return dict(coco_mask.merge(coco_mask.frPyObjects(content, *size_hw)))
    return dict(coco_mask.frPyObjects(content, *size_hw)) if isinstance(content["counts"], list) else dict(content)


def check_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> Any:
    """Return a run-length code, or the polygons of three corners or more, without drawing them.

    Raises:
        DataError: see `encode_mask`.
    """
    form = form_of(segmentation)
    if reason := misfit(form.reach, form.code_hw, size_hw):
        raise DataError(reason)
    return form.content
