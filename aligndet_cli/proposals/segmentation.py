"""Over-segmentation of an image into a few hundred regions: Felzenszwalb & Huttenlocher's graph method, compiled."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.compiling import Floats, Ints, compiled

Pixels = TypeVar("Pixels", NDArray[np.float32], NDArray[np.float64])

# Steps, as (rows, columns), from a pixel to the neighbours that follow in reading order, so that each pair is visited
# once. Edge `n` leads from pixel `n >> shift` by step `n & (2**shift - 1)`.
_FOUR_NEIGHBOURS = np.array([[0, 1], [1, 0]])
_EIGHT_NEIGHBOURS = np.array([[0, 1], [1, -1], [1, 0], [1, 1]])

# Edge weights are sorted by counting, in linear time; differences below 1/4,000 of the range are noise.
_NUM_BINS = 4096


def segment(pixels: Floats, scales: NDArray[np.float64], min_size: int) -> list[NDArray[np.int32]]:
    """Segment an image at several scales; its edges are sorted once for all of them.

    Neighbouring regions are joined while the difference between them is less than the differences inside both, plus
    `scale / region size`. Regions of less than `min_size` pixels are joined to their most similar neighbour.

    Args:
        pixels: (H, W, C) float32; differences are Euclidean distances over the channels.
        scales: (S,) rising values of the method's k, in units of `pixels`; a larger k gives larger regions.

    Returns:
        S label maps, (H, W) int32, 0..R-1 in order of the first pixel.

    Source: Felzenszwalb & Huttenlocher 2004. We differ in three ways: a pixel has four neighbours instead of eight
        (half the time, no worse boxes), weights are rounded to 1/4096 of the largest for sorting, and each scale
        starts from the regions of the scale before instead of from pixels.
    """
    height, width = pixels.shape[:2]
    weights = _edge_weights(pixels, _FOUR_NEIGHBOURS)
    order = _counting_sort(weights, _NUM_BINS)
    return list(_join(order, weights, (height, width), _FOUR_NEIGHBOURS, scales, min_size))


def segment_exactly(pixels: NDArray[np.float64], scale: float, min_size: int) -> NDArray[np.int32]:
    """Return the (H, W) int32 label map of the original: eight neighbours, exactly sorted edges; see `segment`."""
    height, width = pixels.shape[:2]
    weights = _edge_weights(pixels, _EIGHT_NEIGHBOURS)
    order = np.argsort(weights, axis=None, kind="stable")[int((weights < 0).sum()) :].astype(np.uint32)
    return np.asarray(_join(order, weights, (height, width), _EIGHT_NEIGHBOURS, np.array([scale]), min_size)[0])


@compiled
def edge_strength(pixels: Floats) -> Floats:
    """Return the (H, W) gradient length over all channels of (H, W, C) pixels, by central differences."""
    height, width, channels = pixels.shape
    strength = np.empty((height, width), dtype=np.float32)
    for row in range(height):
        above, below = max(row - 1, 0), min(row + 1, height - 1)
        for column in range(width):
            left, right = max(column - 1, 0), min(column + 1, width - 1)
            total = np.float32(0)
            for channel in range(channels):
                across = pixels[row, right, channel] - pixels[row, left, channel]
                down = pixels[below, column, channel] - pixels[above, column, channel]
                total += across * across + down * down
            strength[row, column] = np.sqrt(total)
    return strength


@compiled
def _edge_weights(pixels: Pixels, steps: Ints) -> Pixels:
    """Return the (H * W, steps) distance of each pixel to its neighbour at each step; -1 if that is outside."""
    height, width, channels = pixels.shape
    weights = np.full((height * width, len(steps)), -1, dtype=pixels.dtype)
    for row in range(height):
        for column in range(width):
            for kind in range(len(steps)):
                other_row, other_column = row + steps[kind, 0], column + steps[kind, 1]
                if other_row < height and 0 <= other_column < width:
                    total = pixels.dtype.type(0)
                    for channel in range(channels):
                        difference = pixels[row, column, channel] - pixels[other_row, other_column, channel]
                        total += difference * difference
                    weights[row * width + column, kind] = np.sqrt(total)
    return weights


@compiled
def _counting_sort(weights: Floats, num_bins: int) -> NDArray[np.uint32]:
    """Return the (E,) flat positions of the edges in (H * W, steps) weights, by rising weight and then position."""
    flat = weights.ravel()
    largest = flat.max()
    factor = (num_bins - 1) / largest if largest > 0 else 0.0
    starts = np.zeros(num_bins + 1, dtype=np.int64)
    for weight in flat:
        if weight >= 0:
            starts[int(weight * factor) + 1] += 1
    for number in range(num_bins):
        starts[number + 1] += starts[number]
    order = np.empty(starts[num_bins], dtype=np.uint32)
    for position in range(len(flat)):
        if flat[position] >= 0:
            number = int(flat[position] * factor)
            order[starts[number]] = position
            starts[number] += 1
    return order


@compiled
def _root(parents: NDArray[np.uint32], node: Any) -> Any:
    """Return the first pixel of the region of a pixel, and shorten the path to it."""
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@compiled
def _join(
    order: NDArray[np.uint32],
    weights: NDArray[np.floating],
    size_hw: tuple[int, int],
    steps: Ints,
    scales: NDArray[np.float64],
    min_size: int,
) -> NDArray[np.int32]:
    """Return (S, H, W) int32 label maps from (E,) edges by rising weight; a scale joins regions of the one before."""
    height, width = size_hw
    num_pixels = height * width
    flat = weights.ravel()
    shift, mask = np.uint32(len(steps) // 2), np.uint32(len(steps) - 1)
    reach = steps[:, 0] * width + steps[:, 1]
    parents = np.arange(num_pixels, dtype=np.uint32)
    sizes = np.ones(num_pixels, dtype=np.int32)
    limits = np.zeros(num_pixels, dtype=weights.dtype)  # largest weight inside plus scale / size
    apart = order.copy()  # edges between regions
    labels = np.empty((len(scales), height, width), dtype=np.int32)
    for number in range(len(scales)):
        scale = scales[number]
        limits += ((scale - scales[number - 1] if number else scale) / sizes).astype(weights.dtype)
        num_apart = 0
        for position in apart:
            pixel, kind = position >> shift, position & mask
            other = np.uint32(pixel + reach[kind])
            if parents[pixel] == parents[other]:
                continue
            first, second = _root(parents, pixel), _root(parents, other)
            if first == second:
                continue
            weight = flat[position]
            if weight < limits[first] and weight < limits[second]:
                first, second = min(first, second), max(first, second)
                parents[second] = first
                sizes[first] += sizes[second]
                limits[first] = weight + scale / sizes[first]
            else:
                apart[num_apart] = position
                num_apart += 1
        apart = apart[:num_apart]
        joined = _without_small(apart, parents.copy(), sizes.copy(), reach, shift, min_size)
        labels[number] = joined.reshape(height, width)
    return labels


@compiled
def _without_small(
    apart: NDArray[np.uint32],
    parents: NDArray[np.uint32],
    sizes: NDArray[np.int32],
    reach: Ints,
    shift: np.uint32,
    min_size: int,
) -> NDArray[np.int32]:
    """Join regions of less than `min_size` pixels to their most similar neighbour; return the (H * W,) labels."""
    mask = np.uint32(len(reach) - 1)
    for position in apart:
        pixel, kind = position >> shift, position & mask
        first, second = _root(parents, pixel), _root(parents, np.uint32(pixel + reach[kind]))
        if first != second and min(sizes[first], sizes[second]) < min_size:
            first, second = min(first, second), max(first, second)
            parents[second] = first
            sizes[first] += sizes[second]
    return _numbered(parents)


@compiled
def _numbered(parents: NDArray[np.uint32]) -> NDArray[np.int32]:
    """Return the (H * W,) labels 0..R-1 of the pixels; a region's root is its first pixel, which gives the order."""
    labels = np.empty(len(parents), dtype=np.int32)
    num_regions = 0
    for pixel in range(np.uint32(len(parents))):
        if parents[pixel] == pixel:
            labels[pixel] = num_regions
            num_regions += 1
        else:
            labels[pixel] = labels[parents[pixel]]  # a parent comes before its pixel
    return labels
