"""How alike neighbouring regions are, and their greedy grouping into a hierarchy. Compiled loops."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.proposals.compiling import compiled, inlined
from aligndet_cli.proposals.regions import HISTOGRAM_UNIT, Regions


class Mix(NamedTuple):
    """How much each cue counts in the similarity of two regions; each cue is 0 (unlike) to 1.

    Attributes:
        colour: overlap of the histograms.
        size: 1 - their share of the image: small regions are joined first.
        fill: 1 - the part of the image that their common box holds besides them: holes and bays are filled.
        border: 1 - mean edge strength between them.
        effort: falls with the smaller one's size times how unlike they are (after Ward 1963): a large region is only
            given up for a weak border and a similar colour.
    """

    colour: float = 0
    size: float = 0
    fill: float = 0
    border: float = 0
    effort: float = 0


class Groups(NamedTuple):
    """Regions that were joined, or could have been.

    Attributes:
        boxes: (N, 4) float32 xyxy.
        fills: (N,) float32 part of the box that is the region.
        weakest: (N,) float32 mean edge strength between the region and that neighbour to which it is least.
    """

    boxes: NDArray[np.float32]
    fills: NDArray[np.float32]
    weakest: NDArray[np.float32]


_Arrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


class _Graph(NamedTuple):
    """Edges between regions, in one linked list per region: half-edge `2 * edge + side` is that of `ends[edge, side]`.

    Attributes:
        values: (E,) float32 similarity of the two ends; -1: no longer an edge.
        heads: (R,) first half-edge of each region, -1: none.
        following: (2E,) next half-edge of the same region, -1: none.
        best: (R,) edge to the neighbour that each region is most like, and (R,) float32 how much; -1: none.
        edge_to: (R,) all -1; room to work in.
    """

    values: NDArray[np.float32]
    heads: NDArray[np.int64]
    following: NDArray[np.int64]
    best: NDArray[np.int64]
    best_values: NDArray[np.float32]
    edge_to: NDArray[np.int64]


class _Cues(NamedTuple):
    """`Mix` and the number of pixels of the image, as float32."""

    colour: np.float32
    size: np.float32
    fill: np.float32
    border: np.float32
    effort: np.float32
    num_pixels: np.float32


def group(regions: Regions, mix: Mix, num_pixels: int, pairs_at: tuple[int, ...] = (), min_side: float = 0) -> Groups:
    """Join the two most similar neighbours, again and again, until no neighbours are left.

    Args:
        num_pixels: of the whole image.
        pairs_at: at each of these numbers of regions left, all pairs of neighbours are given out as well: objects of
            two parts that look unlike are not joined in any order.
        min_side: boxes with a shorter side than this many pixels are not given out.

    Returns:
        Joined regions and pairs in the order in which they were met.

    Source: Uijlings et al. 2013, algorithm 1, whose cues are colour, texture, size and fill. `border` and `effort`
        are ours; pairs of neighbours are an idea of Pont-Tuset et al. 2017.
    """
    cues = _Cues(*np.array([*mix, num_pixels], dtype=np.float32))
    return Groups(*_group(regions, cues, np.array(pairs_at, dtype=np.int64), np.float32(min_side)))


def group_alone(regions: Regions, min_side: float = 0) -> Groups:
    """The regions themselves as groups of one. Args: see `group`."""
    return Groups(*_group_alone(regions, np.float32(min_side)))


@compiled
def _group_alone(regions: Regions, min_side: np.float32) -> _Arrays:
    out = _make_room(len(regions.sizes))
    weakest = _weakest_borders(regions, regions.lengths)
    count = 0
    for region in range(len(regions.sizes)):
        if _is_large(regions.boxes[region], min_side):
            count = _write(regions.boxes[region], regions.sizes[region], weakest[region], out, count)
    return out[0][:count], out[1][:count], out[2][:count]


@compiled
def _group(regions: Regions, cues: _Cues, pairs_at: NDArray[np.int64], min_side: np.float32) -> _Arrays:
    regions = _copied(regions)
    graph = _link_all(regions, cues)
    num_left = len(regions.sizes)
    out, count = _make_room(num_left + len(pairs_at) * len(regions.ends)), 0
    while True:
        for number in pairs_at:
            if number == num_left:
                count = _write_pairs(regions, graph, min_side, out, count)
        first = _greatest(graph.best_values)
        if graph.best_values[first] < 0:
            return out[0][:count], out[1][:count], out[2][:count]
        region = _join(graph.best[first], regions, graph, cues)
        num_left -= 1
        if _is_large(regions.boxes[region], min_side):
            weakest = _weakest_border(region, regions, graph)
            count = _write(regions.boxes[region], regions.sizes[region], weakest, out, count)


@inlined
def _make_room(size: int) -> _Arrays:
    """Arrays for so many groups, in the order of `Groups`."""
    return np.empty((size, 4), dtype=np.float32), np.empty(size, dtype=np.float32), np.empty(size, dtype=np.float32)


@inlined
def _write(box: NDArray[np.float32], size: np.float32, weakest: np.float32, out: _Arrays, place: int) -> int:
    """Write a group; returns the place behind it."""
    out[0][place] = box
    out[1][place] = size / ((box[2] - box[0]) * (box[3] - box[1]))
    out[2][place] = weakest
    return place + 1


@inlined
def _is_large(box: NDArray[np.float32], min_side: np.float32) -> bool:
    return box[2] - box[0] >= min_side and box[3] - box[1] >= min_side


@inlined
def _greatest(values: NDArray[np.float32]) -> int:
    """Place of the first greatest value; all are -1 or at least 0."""
    # Such floats have the order of their bits, and only the greatest of whole numbers is found eight at a time.
    bits = values.view(np.int32)
    top = bits[0]
    for bit in bits:
        top = max(top, bit)
    place = 0
    while bits[place] != top:
        place += 1
    return place


@inlined
def _copied(regions: Regions) -> Regions:
    return Regions(
        regions.sizes.copy(),
        regions.boxes.copy(),
        regions.histograms.copy(),
        regions.ends.copy(),
        regions.lengths.copy(),
        regions.strengths.copy(),
    )


@inlined
def _link_all(regions: Regions, cues: _Cues) -> _Graph:
    """The graph before anything is joined."""
    count, num_edges = len(regions.sizes), len(regions.ends)
    graph = _Graph(
        np.empty(num_edges, dtype=np.float32),
        np.full(count, -1),
        np.full(2 * num_edges, -1),
        np.full(count, -1),
        np.full(count, np.float32(-1)),
        np.full(count, -1),
    )
    for edge in range(num_edges):
        graph.values[edge] = _similarity(edge, regions, cues)
        for side in range(2):
            _link(regions.ends[edge, side], 2 * edge + side, graph)
    for region in range(count):
        _find_best(region, graph)
    return graph


@inlined
def _join(edge: int, regions: Regions, graph: _Graph, cues: _Cues) -> int:
    """Make one region of the two ends of an edge; returns the end that lives on."""
    i, j = regions.ends[edge]
    graph.values[edge] = graph.best_values[j] = -1
    _unite(i, j, regions)
    _take_edges(i, j, regions, graph)
    half = graph.heads[i]
    graph.heads[i] = -1
    while half >= 0:  # link again what is still an edge, with its new similarity
        edge, after = half >> 1, graph.following[half]
        if graph.values[edge] >= 0:
            _link(i, half, graph)
            other = regions.ends[edge, 1 - (half & 1)]
            graph.values[edge] = _similarity(edge, regions, cues)
            if graph.best[other] == edge or graph.values[graph.best[other]] < 0:
                _find_best(other, graph)
            elif graph.values[edge] > graph.best_values[other]:
                graph.best[other], graph.best_values[other] = edge, graph.values[edge]
        half = after
    _find_best(i, graph)
    return i


@inlined
def _take_edges(i: int, j: int, regions: Regions, graph: _Graph) -> None:
    """Give the edges of j to i, or add them to the edge that i has to the same region."""
    half = graph.heads[i]
    while half >= 0:
        if graph.values[half >> 1] >= 0:
            graph.edge_to[regions.ends[half >> 1, 1 - (half & 1)]] = half >> 1
        half = graph.following[half]
    half = graph.heads[j]
    while half >= 0:
        edge, side, after = half >> 1, half & 1, graph.following[half]
        if graph.values[edge] >= 0:
            same = graph.edge_to[regions.ends[edge, 1 - side]]
            if same >= 0:
                regions.lengths[same] += regions.lengths[edge]
                regions.strengths[same] += regions.strengths[edge]
                graph.values[edge] = -1
            else:
                regions.ends[edge, side] = i
                _link(i, half, graph)
        half = after
    half = graph.heads[i]
    while half >= 0:
        graph.edge_to[regions.ends[half >> 1, 1 - (half & 1)]] = -1
        half = graph.following[half]


@inlined
def _link(region: int, half: int, graph: _Graph) -> None:
    """Put a half-edge at the head of a region's list."""
    graph.following[half] = graph.heads[region]
    graph.heads[region] = half


@inlined
def _find_best(region: int, graph: _Graph) -> None:
    """Note a region's edge to the neighbour that it is most like."""
    found, top = -1, np.float32(-1)
    half = graph.heads[region]
    while half >= 0:
        if graph.values[half >> 1] > top:
            found, top = half >> 1, graph.values[half >> 1]
        half = graph.following[half]
    graph.best[region], graph.best_values[region] = found, top


@inlined
def _similarity(edge: int, regions: Regions, cues: _Cues) -> np.float32:
    """See `Mix`."""
    i, j = regions.ends[edge]
    one = np.float32(1)
    both = regions.sizes[i] + regions.sizes[j]
    smooth = one - regions.strengths[edge] / regions.lengths[edge]
    total = cues.border * smooth + cues.size * (one - both / cues.num_pixels)
    if cues.fill > 0:
        box, other = regions.boxes[i], regions.boxes[j]
        width, height = max(box[2], other[2]) - min(box[0], other[0]), max(box[3], other[3]) - min(box[1], other[1])
        total += cues.fill * (one - (width * height - both) / cues.num_pixels)
    if cues.colour > 0 or cues.effort > 0:
        first, second, shared = regions.histograms[i], regions.histograms[j], np.int32(0)
        for code in range(len(first)):
            shared += min(first[code], second[code])
        alike = shared / np.float32(HISTOGRAM_UNIT)
        unlike = np.float32(1.02) - smooth + one - alike
        smaller = min(regions.sizes[i], regions.sizes[j]) / cues.num_pixels
        total += cues.colour * alike + cues.effort / (one + np.float32(50) * unlike * smaller)
    return max(total, np.float32(0))


@inlined
def _unite(i: int, j: int, regions: Regions) -> None:
    """Make region i the union of both."""
    share = regions.sizes[i] / (regions.sizes[i] + regions.sizes[j])
    first, second = regions.histograms[i], regions.histograms[j]
    for code in range(len(first)):
        first[code] = np.int32(first[code] * share + second[code] * (1 - share) + np.float32(0.5))
    regions.sizes[i] += regions.sizes[j]
    _cover(regions.boxes[i], regions.boxes[j], regions.boxes[i])


@inlined
def _cover(box: NDArray[np.float32], other: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write the common box of two."""
    out[0], out[1] = min(box[0], other[0]), min(box[1], other[1])
    out[2], out[3] = max(box[2], other[2]), max(box[3], other[3])


@inlined
def _weakest_borders(regions: Regions, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(R,) least mean edge strength between each region and one of its neighbours; 1 if it has none.

    Args:
        values: (E,) float32; edges with negative ones do not count.
    """
    weakest = np.ones(len(regions.sizes), dtype=np.float32)
    for edge in range(len(regions.ends)):
        if values[edge] >= 0:
            between = regions.strengths[edge] / regions.lengths[edge]
            for side in range(2):
                region = regions.ends[edge, side]
                weakest[region] = min(weakest[region], between)
    return weakest


@inlined
def _weakest_border(region: int, regions: Regions, graph: _Graph) -> np.float32:
    """The same for a single region."""
    weakest = np.float32(1)
    half = graph.heads[region]
    while half >= 0:
        edge = half >> 1
        if graph.values[edge] >= 0:
            weakest = min(weakest, regions.strengths[edge] / regions.lengths[edge])
        half = graph.following[half]
    return weakest


@inlined
def _write_pairs(regions: Regions, graph: _Graph, min_side: np.float32, out: _Arrays, place: int) -> int:
    """Write all pairs of neighbours that are left; returns the place behind them."""
    weakest = _weakest_borders(regions, graph.values)
    box = np.empty(4, dtype=np.float32)
    for edge in range(len(regions.ends)):
        if graph.values[edge] >= 0:
            i, j = regions.ends[edge]
            _cover(regions.boxes[i], regions.boxes[j], box)
            if _is_large(box, min_side):
                place = _write(box, regions.sizes[i] + regions.sizes[j], min(weakest[i], weakest[j]), out, place)
    return place
