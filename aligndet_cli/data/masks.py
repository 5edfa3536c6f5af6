"""Masks of labelled boxes, drawn when an image is used. Free of torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import MAX_PIXELS
from aligndet_cli.data.segmentations import usable_polygons
from aligndet_cli.errors import DataError

_FARTHEST = 10  # coordinates by the longer side of the image: beyond it is no clipped object but a mistake


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
    code = encode_mask(segmentation, size_hw)
    return np.zeros(size_hw, dtype=np.bool_) if code is None else np.asarray(coco_mask.decode(code), dtype=np.bool_)


def encode_mask(segmentation: Any, size_hw: tuple[int, int]) -> dict[str, Any] | None:
    """Return the run-length code of a COCO segmentation; None without a polygon of three corners.

    This is the one way from labels to pycocotools, whose C code checks nothing: a coordinate that is NaN or 1e9 takes
    all memory of the machine, and a code that is too long is written beyond its mask.

    Args:
        segmentation: polygons, also a single one as a flat list, or a run-length code, compressed or not.

    Raises:
        DataError: none of these, of another size than the image, or with numbers that mean no place in it.
    """
    checked = check_segmentation(segmentation, size_hw)
    if isinstance(checked, dict):
        return checked
    return coco_mask.merge(coco_mask.frPyObjects(checked, *size_hw)) if checked else None


def check_segmentation(segmentation: Any, size_hw: tuple[int, int]) -> dict[str, Any] | list[list[float]]:
    """Return a compressed run-length code, or the polygons of three corners or more, without drawing them.

    Raises:
        DataError: see `encode_mask`.
    """
    if size_hw[0] * size_hw[1] > MAX_PIXELS:
        raise DataError(f"a mask is of an image of {size_hw[1]}x{size_hw[0]} pixels, which cannot be read")
    try:
        if isinstance(segmentation, dict):
            return _checked_code(segmentation, size_hw)
        polygons = [_numbers(polygon) for polygon in usable_polygons(list(segmentation))]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"a mask is neither polygons nor a run-length code ({error})") from None
    limit = _FARTHEST * max(size_hw)
    for value in (value for polygon in polygons for value in polygon):
        if not -limit <= value <= limit:  # NaN too
            raise DataError(f"a mask has the coordinate {value:g}, far from its image of {size_hw[1]}x{size_hw[0]}")
    return polygons


def _numbers(polygon: Any) -> list[float]:
    if not isinstance(polygon, list | tuple):
        raise TypeError(f"{polygon!r} is no list of coordinates")
    return [float(value) for value in polygon]


def _checked_code(code: dict[str, Any], size_hw: tuple[int, int]) -> dict[str, Any]:
    if tuple(code["size"]) != size_hw:
        raise DataError(f"a mask is {code['size']} (height, width) but its image {list(size_hw)}")
    counts = code["counts"]
    is_plain = isinstance(counts, list)
    runs = [int(count) for count in counts] if is_plain else _runs_of(counts)
    if min(runs, default=0) < 0 or sum(runs) != size_hw[0] * size_hw[1]:
        raise DataError(f"a run-length code is of {sum(runs)} pixels but its image has {size_hw[0] * size_hw[1]}")
    return dict(coco_mask.frPyObjects({"size": list(size_hw), "counts": runs}, *size_hw)) if is_plain else code


def _runs_of(text: str | bytes) -> list[int]:
    """Return the runs of a compressed code.

    Source: cocoapi's maskApi.c: 5 bits a letter, and a sixth where more follow; from the fourth run on, differences to
    the last run but one.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text.encode("ascii") if isinstance(text, str) else text:
        bits = letter - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its text ends within a number")
    return runs
