"""SoCo's selective search, to reproduce the paper: one segmentation at full resolution, grouped once.

Its quirks are kept, since they decide which regions are joined: all hues and saturations are in the first histogram
bin, regions are neighbours if their boxes cross, and a box ends on its last pixel, not behind it.

Source: SoCo (Wei et al. 2021), whose code follows AlpacaDB's `selectivesearch`; constants from the paper, D.1.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from aligndet_cli.compiling import Floats, Ints, compiled
from aligndet_cli.proposals.grouping import Mix, group
from aligndet_cli.proposals.regions import Regions, measure
from aligndet_cli.proposals.segmentation import segment_exactly

_SCALE, _SIGMA, _MIN_REGION = 300.0, 0.9, 100
_BLUR_REACH = 4.0  # sigmas after which the Gaussian is cut off; SciPy's default
_VALUE_BINS, _TEXTURE_BINS = 25, 10
# The order of the boxes depends on the sixth digit of similarities, so the unit is as fine as float32. The six
# histograms of a region sum to 6 * 2**24, far below the limit of int32.
_HISTOGRAM_UNIT = 2**24

# (row, column) of eight points on a circle of radius 1, rounded to the same digits as in scikit-image.
_D = 0.70711
_CIRCLE = ((0.0, 1.0), (-_D, _D), (-1.0, 0.0), (-_D, -_D), (0.0, -1.0), (_D, -_D), (1.0, 0.0), (_D, _D))


def search_as_soco(image: NDArray[np.uint8]) -> Floats:
    """Return boxes, (N, 4) float32 xyxy, of an (H, W, 3) uint8 RGB image, see `group_as_soco`."""
    size = 2 * int(_BLUR_REACH * _SIGMA + 0.5) + 1
    pixels = cv2.GaussianBlur(image / 255.0, (size, size), _SIGMA, borderType=cv2.BORDER_REFLECT)
    labels = segment_exactly(np.asarray(pixels, dtype=np.float64), _SCALE / 255.0, _MIN_REGION)
    return group_as_soco(image, labels)


def group_as_soco(image: NDArray[np.uint8], labels: NDArray[np.int32]) -> Floats:
    """Return (N, 4) float32 xyxy boxes: regions by their first pixel, then joined regions in the order of joining.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) int32, 0..R-1 in order of the first pixel.
    """
    sizes, boxes, _ = measure(labels, np.empty((*labels.shape, 0), dtype=np.uint8), 0)
    boxes[:, 2:] -= 1
    ends = _crossing_pairs(boxes)
    nothing = np.ones(len(ends), dtype=np.float32)
    regions = Regions(sizes, boxes, _histograms(image, labels, sizes), ends, nothing, 0 * nothing, _HISTOGRAM_UNIT)
    groups = group(regions, Mix(colour=1, size=1, fill=1), labels.size)
    return np.concatenate([boxes, groups.boxes])


@compiled
def _crossing_pairs(boxes: Floats) -> NDArray[np.int32]:
    """Return (E, 2) pairs of (R, 4) boxes of which the later has a corner strictly inside the earlier.

    A loop instead of a table of all pairs, since a photo of 12 megapixels has thousands of regions.
    """
    pairs = []
    for i in range(len(boxes)):
        x1, y1, x2, y2 = boxes[i]
        for j in range(i + 1, len(boxes)):
            box = boxes[j]
            if (x1 < box[0] < x2 or x1 < box[2] < x2) and (y1 < box[1] < y2 or y1 < box[3] < y2):
                pairs.append(i)
                pairs.append(j)
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)


def _histograms(image: NDArray[np.uint8], labels: NDArray[np.int32], sizes: Floats) -> NDArray[np.int32]:
    """Return (R, B) shares of each region's pixels by hue, saturation, value and textures, times `_HISTOGRAM_UNIT`."""
    columns: list[NDArray[Any]] = [
        np.stack([sizes, sizes], axis=1),
        _counts(image.max(axis=2), _VALUE_BINS, labels, len(sizes)),
    ]
    columns += [
        _counts(_texture_codes(image[:, :, channel].astype(np.float64)), _TEXTURE_BINS, labels, len(sizes))
        for channel in range(3)
    ]
    return np.rint(np.concatenate(columns, axis=1) / sizes[:, None] * _HISTOGRAM_UNIT).astype(np.int32)


def _counts(values: NDArray[np.uint8], bins: int, labels: NDArray[np.int32], num_regions: int) -> Ints:
    """Return the (R, bins) histogram of (H, W) values 0..255 in each region."""
    places = np.minimum(values.astype(np.int32) * bins // 255, bins - 1) + labels * bins
    return np.bincount(places.ravel(), minlength=num_regions * bins).reshape(num_regions, bins)


@compiled
def _texture_codes(channel: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return (H, W) uint8 local binary patterns: bit n is set if the n-th of eight points around is not darker.

    The points are interpolated on a circle of radius 1, counter-clockwise from the right; outside the image is 0.
    """
    height, width = channel.shape
    codes = np.zeros((height, width), dtype=np.uint8)
    for row in range(height):
        for column in range(width):
            for bit in range(8):
                y, x = row + _CIRCLE[bit][0], column + _CIRCLE[bit][1]
                top, left = int(np.floor(y)), int(np.floor(x))
                down, right = y - top, x - left
                above = (1 - right) * _at(channel, top, left) + right * _at(channel, top, left + 1)
                below = (1 - right) * _at(channel, top + 1, left) + right * _at(channel, top + 1, left + 1)
                if (1 - down) * above + down * below >= channel[row, column]:
                    codes[row, column] |= 1 << bit
    return codes


@compiled
def _at(channel: NDArray[np.float64], row: int, column: int) -> float:
    if 0 <= row < channel.shape[0] and 0 <= column < channel.shape[1]:
        return channel[row, column]
    return 0.0
