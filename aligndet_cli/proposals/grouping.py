"""Similarity of neighbouring regions, and their greedy grouping into a hierarchy, in compiled loops.

Functions called inside loops take arrays, not tuples of arrays: numba counts references to each array of a tuple at
each call, which takes longer than the work itself.
"""

import copy
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.compiling import Floats, Ints, compiled
from aligndet_cli.proposals.regions import Regions


class Mix(NamedTuple):
    """Weights of the cues in the similarity of two regions; each cue is 0 (unlike) to 1.

    Attributes:
        colour: overlap of the histograms.
        size: 1 - share of the image that both cover: small regions are joined first.
        fill: 1 - share of the image that is in their common box but in neither region: holes and bays are filled.
        border: 1 - mean edge strength between the regions.
        effort: falls with the size of the smaller region times the contrast (after Ward 1963): a large region is only
            joined across a weak border to a similar colour.
    """

    colour: float = 0
    size: float = 0
    fill: float = 0
    border: float = 0
    effort: float = 0


class Groups(NamedTuple):
    """Boxes of regions, of joined regions, or of pairs of neighbours.

    Attributes:
        boxes: (N, 4) float32 xyxy.
        fills: (N,) float32 share of the box that the region covers.
        contrasts: (N,) float32 contrast to the most similar neighbour, 0..1: half the edge strength between the two,
            plus half of what their histograms do not share. 1 without neighbours.
    """

    boxes: Floats
    fills: Floats
    contrasts: Floats


class _Graph(NamedTuple):
    """Edges between R regions, in a linked list per region; half-edge `2 * edge + side` belongs to `ends[edge, side]`.

    Attributes:
        values: (E,) float32 similarity of the two ends; -1: no longer an edge.
        heads: (R,) first half-edge of each region, -1: none.
        following: (2E,) next half-edge of the same region, -1: none.
        best: (R,) edge to the most similar neighbour, -1: none.
        best_values: (R,) float32 similarity to that neighbour, -1: none.
        edge_to: (R,) work space, all -1 between uses.
    """

    values: Floats
    heads: Ints
    following: Ints
    best: Ints
    best_values: Floats
    edge_to: Ints


class _Cues(NamedTuple):
    """Weights as in `Mix`, number of pixels of the image, and unit of the histograms, as float32."""

    colour: np.float32
    size: np.float32
    fill: np.float32
    border: np.float32
    effort: np.float32
    num_pixels: np.float32
    histogram_unit: np.float32


def group(regions: Regions, mix: Mix, num_pixels: int, pairs_at: tuple[int, ...] = (), min_side: float = 0) -> Groups:
    """Join the two most similar neighbours, again and again, until no neighbours are left.

    Args:
        num_pixels: of the whole image.
        pairs_at: when one of these numbers of regions is left, all pairs of neighbours are returned as well, to find
            objects of two parts that look different.
        min_side: boxes with a side shorter than this many pixels are left out.

    Returns:
        N joined regions and pairs, in the order in which they were found.

    Source: Uijlings et al. 2013, algorithm 1, whose cues are colour, texture, size and fill. `border` and `effort`
        are ours; pairs of neighbours are an idea of Pont-Tuset et al. 2017.
    """
    cues = _Cues(*np.array([*mix, num_pixels, regions.histogram_unit], dtype=np.float32))
    return _split(_group(copy.deepcopy(regions), cues, np.array(pairs_at, dtype=np.int64), np.float32(min_side)))


def group_alone(regions: Regions, min_side: float = 0) -> Groups:
    """Return each of the R regions as a group of its own; `min_side` as in `group`."""
    return _split(_group_alone(regions, np.float32(min_side)))


def _split(rows: Floats) -> Groups:
    """Split (N, 6) rows of box, fill and contrast."""
    return Groups(rows[:, :4], rows[:, 4], rows[:, 5])


@compiled
def _group_alone(regions: Regions, min_side: np.float32) -> Floats:
    rows, count = np.empty((len(regions.sizes), 6), dtype=np.float32), 0
    contrasts = _least_contrasts(regions, regions.lengths)
    for region in range(len(regions.sizes)):
        count = _write(regions.boxes[region], regions.sizes[region], contrasts[region], min_side, rows, count)
    return rows[:count]


@compiled
def _group(regions: Regions, cues: _Cues, pairs_at: Ints, min_side: np.float32) -> Floats:
    """Return (N, 6) rows of box, fill and contrast; `regions` are changed."""
    graph = _link_all(regions, cues)
    num_left = len(regions.sizes)
    rows, count = np.empty((num_left + len(pairs_at) * len(regions.ends), 6), dtype=np.float32), 0
    while True:
        for number in pairs_at:
            if number == num_left:
                count = _write_pairs(regions, graph.values, min_side, rows, count)
        first = _greatest(graph.best_values)
        if graph.best_values[first] < 0:
            return rows[:count]
        region, contrast = _join(graph.best[first], regions, graph, cues)
        num_left -= 1
        count = _write(regions.boxes[region], regions.sizes[region], contrast, min_side, rows, count)


@compiled
def _write(box: Floats, size: np.float32, contrast: np.float32, min_side: np.float32, rows: Floats, place: int) -> int:
    """Write a group into `rows` (N, 6) unless its box is too small; return the next free place."""
    width, height = box[2] - box[0], box[3] - box[1]
    if width < min_side or height < min_side:
        return place
    for column in range(4):
        rows[place, column] = box[column]
    rows[place, 4], rows[place, 5] = size / (width * height), contrast
    return place + 1


@compiled
def _greatest(values: Floats) -> int:
    """Return the place of the first greatest of (N,) values, all of which are -1 or at least 0."""
    # Such floats sort like their bits, and the compiler compares eight integers at a time, but not floats.
    bits = values.view(np.int32)
    top = bits[0]
    for bit in bits:
        top = max(top, bit)
    place = 0
    while bits[place] != top:
        place += 1
    return place


@compiled
def _link_all(regions: Regions, cues: _Cues) -> _Graph:
    """Build the graph before anything is joined."""
    sizes, boxes, histograms, ends, lengths, strengths, _ = regions
    values = np.empty(len(ends), dtype=np.float32)
    heads, following = np.full(len(sizes), -1), np.full(2 * len(ends), -1)
    best, best_values = np.full(len(sizes), -1), np.full(len(sizes), np.float32(-1))
    for edge in range(len(ends)):
        i, j = ends[edge]
        values[edge] = _similarity(i, j, strengths[edge] / lengths[edge], histograms, sizes, boxes, cues)[0]
        _link(i, 2 * edge, heads, following)
        _link(j, 2 * edge + 1, heads, following)
    for region in range(len(sizes)):
        best[region], best_values[region] = _find_best(region, heads, following, values)
    return _Graph(values, heads, following, best, best_values, np.full(len(sizes), -1))


@compiled
def _join(edge: int, regions: Regions, graph: _Graph, cues: _Cues) -> tuple[int, np.float32]:
    """Join the two ends of an edge; return the number of the joined region and its contrast, see `Groups`."""
    sizes, boxes, histograms, ends, lengths, strengths, _ = regions
    values, heads, following, best, best_values, _ = graph
    i, j = ends[edge]
    values[edge] = best_values[j] = -1
    _unite(i, j, sizes, boxes, histograms)
    _take_edges(i, j, regions, graph)
    contrast = np.float32(1)
    half = heads[i]
    heads[i] = -1
    while half >= 0:  # link the remaining edges again, with their new similarity
        edge, after = half >> 1, following[half]
        if values[edge] >= 0:
            _link(i, half, heads, following)
            other = ends[edge, 1 - (half & 1)]
            strength = strengths[edge] / lengths[edge]
            values[edge], between = _similarity(i, other, strength, histograms, sizes, boxes, cues)
            contrast = min(contrast, between)
            if best[other] == edge or values[best[other]] < 0:
                best[other], best_values[other] = _find_best(other, heads, following, values)
            elif values[edge] > best_values[other]:
                best[other], best_values[other] = edge, values[edge]
        half = after
    best[i], best_values[i] = _find_best(i, heads, following, values)
    return i, contrast


@compiled
def _take_edges(i: int, j: int, regions: Regions, graph: _Graph) -> None:
    """Move the edges of j to i; add an edge to the same region to the one that i has already."""
    ends, lengths, strengths = regions.ends, regions.lengths, regions.strengths
    values, heads, following, edge_to = graph.values, graph.heads, graph.following, graph.edge_to
    half = heads[i]
    while half >= 0:
        if values[half >> 1] >= 0:
            edge_to[ends[half >> 1, 1 - (half & 1)]] = half >> 1
        half = following[half]
    half = heads[j]
    while half >= 0:
        edge, side, after = half >> 1, half & 1, following[half]
        if values[edge] >= 0:
            same = edge_to[ends[edge, 1 - side]]
            if same >= 0:
                lengths[same] += lengths[edge]
                strengths[same] += strengths[edge]
                values[edge] = -1
            else:
                ends[edge, side] = i
                _link(i, half, heads, following)
        half = after
    half = heads[i]
    while half >= 0:
        edge_to[ends[half >> 1, 1 - (half & 1)]] = -1
        half = following[half]


@compiled
def _link(region: int, half: int, heads: Ints, following: Ints) -> None:
    """Put a half-edge at the head of a region's list."""
    following[half] = heads[region]
    heads[region] = half


@compiled
def _find_best(region: int, heads: Ints, following: Ints, values: Floats) -> tuple[int, np.float32]:
    """Return the edge to the most similar neighbour of a region and the similarity; -1 for both if it has none."""
    found, top = -1, np.float32(-1)
    half = heads[region]
    while half >= 0:
        if values[half >> 1] > top:
            found, top = half >> 1, values[half >> 1]
        half = following[half]
    return found, top


@compiled
def _similarity(
    i: int, j: int, strength: np.float32, histograms: NDArray[np.int32], sizes: Floats, boxes: Floats, cues: _Cues
) -> tuple[np.float32, np.float32]:
    """Return similarity and contrast of two neighbours with this mean edge strength between, see `Mix` and `Groups`."""
    one, num_pixels = np.float32(1), cues.num_pixels
    both = sizes[i] + sizes[j]
    colour = _common_colours(i, j, histograms, cues.histogram_unit)
    total = cues.border * (one - strength) + cues.size * (one - both / num_pixels) + cues.colour * colour
    if cues.fill > 0:
        width = max(boxes[i, 2], boxes[j, 2]) - min(boxes[i, 0], boxes[j, 0])
        height = max(boxes[i, 3], boxes[j, 3]) - min(boxes[i, 1], boxes[j, 1])
        total += cues.fill * (one - (width * height - both) / num_pixels)
    contrast = _contrast(strength, colour)
    if cues.effort > 0:
        smaller = min(sizes[i], sizes[j]) / num_pixels
        total += cues.effort / (one + np.float32(100) * (contrast + np.float32(0.01)) * smaller)
    return max(total, np.float32(0)), contrast


@compiled
def _contrast(strength: np.float32, colour: np.float32) -> np.float32:
    """Return the contrast of two neighbours, from the edge strength between them and the overlap of histograms."""
    return np.float32(0.5) * (strength + np.float32(1) - colour)


@compiled
def _common_colours(i: int, j: int, histograms: NDArray[np.int32], unit: np.float32) -> np.float32:
    """Return the overlap, 0..1, of rows i and j of (R, B) histograms."""
    shared = np.int32(0)
    for code in range(histograms.shape[1]):
        shared += min(histograms[i, code], histograms[j, code])
    return shared / unit


@compiled
def _unite(i: int, j: int, sizes: Floats, boxes: Floats, histograms: NDArray[np.int32]) -> None:
    """Make region i the union of regions i and j."""
    share = sizes[i] / (sizes[i] + sizes[j])
    for code in range(histograms.shape[1]):
        histograms[i, code] = np.int32(
            histograms[i, code] * share + histograms[j, code] * (1 - share) + np.float32(0.5)
        )
    sizes[i] += sizes[j]
    _cover(boxes[i], boxes[j], boxes[i])


@compiled
def _cover(box: Floats, other: Floats, out: Floats) -> None:
    """Write the common box of two xyxy boxes."""
    out[0], out[1] = min(box[0], other[0]), min(box[1], other[1])
    out[2], out[3] = max(box[2], other[2]), max(box[3], other[3])


@compiled
def _least_contrasts(regions: Regions, values: Floats) -> Floats:
    """Return the (R,) contrast of each region, see `Groups`; an edge with a negative one of the (E,) values is gone."""
    histograms, ends, lengths, strengths = regions.histograms, regions.ends, regions.lengths, regions.strengths
    unit = np.float32(regions.histogram_unit)
    least = np.ones(len(regions.sizes), dtype=np.float32)
    for edge in range(len(ends)):
        if values[edge] >= 0:
            i, j = ends[edge]
            contrast = _contrast(strengths[edge] / lengths[edge], _common_colours(i, j, histograms, unit))
            least[i], least[j] = min(least[i], contrast), min(least[j], contrast)
    return least


@compiled
def _write_pairs(regions: Regions, values: Floats, min_side: np.float32, rows: Floats, place: int) -> int:
    """Write all pairs of neighbours that are left into `rows` (N, 6); return the next free place."""
    sizes, boxes, ends = regions.sizes, regions.boxes, regions.ends
    contrasts = _least_contrasts(regions, values)
    box = np.empty(4, dtype=np.float32)
    for edge in range(len(ends)):
        if values[edge] >= 0:
            i, j = ends[edge]
            _cover(boxes[i], boxes[j], box)
            place = _write(box, sizes[i] + sizes[j], min(contrasts[i], contrasts[j]), min_side, rows, place)
    return place
