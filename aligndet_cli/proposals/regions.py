"""Size, box, colours and neighbours of the regions of a label map."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.compiling import Floats, compiled

# Histograms are integers in units of 1 / 2**14, so that sums are exact in any order and on any processor.
HISTOGRAM_UNIT = 2**14


class Regions(NamedTuple):
    """R regions, and E pairs of neighbouring regions.

    Attributes:
        sizes: (R,) float32 number of pixels.
        boxes: (R, 4) float32 xyxy in pixels of the label map.
        histograms: (R, B) int32 shares of the pixels, in units of 1 / `histogram_unit`.
        ends: (E, 2) int32 regions of each pair.
        lengths: (E,) float32 number of pairs of pixels along the border of the two.
        strengths: (E,) float32 edge strength, summed over these pairs.
        histogram_unit: a power of two.
    """

    sizes: Floats
    boxes: Floats
    histograms: NDArray[np.int32]
    ends: NDArray[np.int32]
    lengths: Floats
    strengths: Floats
    histogram_unit: int


def describe_regions(labels: NDArray[np.int32], codes: NDArray[np.uint8], num_codes: int, strength: Floats) -> Regions:
    """Measure all regions of a label map.

    Args:
        labels: (H, W) int32, 0..R-1.
        codes: (H, W, C) uint8 histogram bin of each channel of each pixel, 0..num_codes-1.
        strength: (H, W) float32 edge strength, 0..1.

    Returns:
        R regions, with histograms that sum to about `HISTOGRAM_UNIT`.
    """
    sizes, boxes, counts = measure(labels, codes, num_codes)
    ends, lengths, strengths = _find_borders(labels, strength, len(sizes))
    shares = counts * (HISTOGRAM_UNIT / (sizes[:, None] * codes.shape[2]))
    return Regions(sizes, boxes, np.rint(shares).astype(np.int32), ends, lengths, strengths, HISTOGRAM_UNIT)


@compiled
def measure(labels: NDArray[np.int32], codes: NDArray[np.uint8], num_codes: int) -> tuple[Floats, Floats, Floats]:
    """Return sizes (R,), boxes (R, 4) xyxy and histogram counts (R, C * num_codes); see `describe_regions`."""
    height, width, channels = codes.shape
    count = labels.max() + 1
    sizes = np.zeros(count, dtype=np.int64)  # float32 cannot count beyond 2**24
    boxes = np.empty((count, 4), dtype=np.float32)
    boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3] = width, height, 0, 0
    counts = np.zeros((count, channels * num_codes), dtype=np.int64)
    for row in range(height):
        for column in range(width):
            label = labels[row, column]
            sizes[label] += 1
            box = boxes[label]
            box[0], box[1] = min(box[0], column), min(box[1], row)
            box[2], box[3] = max(box[2], column + 1), max(box[3], row + 1)
            for channel in range(channels):
                counts[label, channel * num_codes + codes[row, column, channel]] += 1
    return sizes.astype(np.float32), boxes, counts.astype(np.float32)


@compiled
def _find_borders(labels: NDArray[np.int32], strength: Floats, count: int) -> tuple[NDArray[np.int32], Floats, Floats]:
    """Return pairs of neighbours (E, 2), and length (E,) and strength (E,) of the border between them."""
    height, width = labels.shape
    edge_of = np.full((count, count), -1, dtype=np.int32)
    most = 3 * count  # a planar graph has fewer than three edges per region
    ends = np.empty((most, 2), dtype=np.int32)
    lengths, strengths = np.zeros(most, dtype=np.float32), np.zeros(most, dtype=np.float32)
    num_edges = 0
    for row in range(height):
        for column in range(width):
            label = labels[row, column]
            for down, right in ((0, 1), (1, 0)):
                if row + down == height or column + right == width:
                    continue
                other = labels[row + down, column + right]
                if other == label:
                    continue
                first, second = min(label, other), max(label, other)
                if edge_of[first, second] < 0:
                    edge_of[first, second] = num_edges
                    ends[num_edges, 0], ends[num_edges, 1] = first, second
                    num_edges += 1
                edge = edge_of[first, second]
                lengths[edge] += 1
                strengths[edge] += max(strength[row, column], strength[row + down, column + right])
    return ends[:num_edges], lengths[:num_edges], strengths[:num_edges]
