"""Pictures of clusters: their sizes, and a sheet with a row of crops for each, those nearest its centroid first."""

from pathlib import Path

import cv2
import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from aligndet_cli.cluster.features import ProposalImages
from aligndet_cli.cluster.report import Members
from aligndet_cli.data.images import read_image
from aligndet_cli.errors import DataError
from aligndet_cli.files import write_bytes
from aligndet_cli.plotting import COLOURS, JPEG, REFERENCE, finish_axes, new_figure, save_figure

NUM_CLUSTERS, NUM_CROPS = 16, 8
_TILE = 96
_GAP = 4
_TEXT_WIDTH = 132
_CONTEXT = 0.1  # of the box's size, shown around it


def draw_sheet(file: Path, source: ProposalImages, members: Members) -> None:
    """Write a JPEG with crops of the 16 largest clusters, in two columns; the box is drawn inside each crop."""
    largest = np.argsort(-members.sizes, kind="stable")[:NUM_CLUSTERS]
    largest = largest[members.sizes[largest] > 0]
    strips = [_draw_strip(source, members, int(cluster_id)) for cluster_id in largest]
    if len(strips) % 2:
        strips.append(np.full_like(strips[0], 255))
    half = len(strips) // 2
    rows = [np.hstack(pair) for pair in zip(strips[:half], strips[half:], strict=True)]
    _, encoded = cv2.imencode(".jpg", np.vstack(rows)[..., ::-1], JPEG)
    write_bytes(file, encoded.tobytes())


def draw_sizes(file: Path, members: Members) -> None:
    """Write the number of proposals of each cluster, largest first, beside what it is when all are of one size."""
    sizes = np.sort(members.sizes)[::-1]
    figure = new_figure(6.5, 3.4)
    axes = figure.add_subplot()
    axes.bar(np.arange(1, len(sizes) + 1), sizes, width=1.0 if len(sizes) > 64 else 0.85, color=COLOURS[0])
    label = f"all of one size: {sizes.mean():.4g}"
    axes.axhline(float(sizes.mean()), color=REFERENCE, linestyle="--", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_xlim(0.3, len(sizes) + 0.7)
    num_dead = int((sizes == 0).sum())
    finish_axes(axes, title=f"{len(sizes)} clusters, {num_dead} empty", x="cluster, largest first", y="proposals")
    save_figure(figure, file)


def nearest_rows(members: Members, cluster_id: int, offsets: NDArray[np.int64]) -> list[int]:
    """Rows of a cluster nearest its centroid, at most 8 and from different images while there are enough.

    Neighbouring proposals of one image are near-copies: eight of them would show one object, not a cluster.

    Args:
        offsets: (B + 1,) rows of image i are offsets[i]:offsets[i + 1].
    """
    rows = np.flatnonzero(members.labels == cluster_id)
    rows = rows[np.argsort(members.distances[rows], kind="stable")]
    owners = np.searchsorted(offsets, rows, side="right")
    seen: set[int] = set()
    first: list[int] = []
    repeated: list[int] = []
    for row, owner in zip(rows.tolist(), owners.tolist(), strict=True):
        (repeated if owner in seen else first).append(row)
        seen.add(owner)
        if len(first) == NUM_CROPS:
            break
    return (first + repeated)[:NUM_CROPS]


def _draw_strip(source: ProposalImages, members: Members, cluster_id: int) -> NDArray[np.uint8]:
    """(tile + gap, text + 8 tiles, 3) uint8 RGB."""
    width = _TEXT_WIDTH + NUM_CROPS * (_TILE + _GAP)
    strip = np.full((_TILE + _GAP, width, 3), 255, dtype=np.uint8)
    size = int(members.sizes[cluster_id])
    lines = (f"cluster {cluster_id}", f"{size:,} boxes", f"{size / len(members.labels):.1%} of all")
    for index, text in enumerate(lines):
        where = (8, 34 + 20 * index)
        cv2.putText(strip, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (30, 30, 30), 1, cv2.LINE_AA)
    for index, row in enumerate(nearest_rows(members, cluster_id, source.store.offsets)):
        left = _TEXT_WIDTH + index * (_TILE + _GAP)
        strip[_GAP // 2 : _GAP // 2 + _TILE, left : left + _TILE] = _draw_crop(source, row)
    return strip


def _draw_crop(source: ProposalImages, row: int) -> NDArray[np.uint8]:
    """(tile, tile, 3) uint8 RGB: the box with a margin, at its own aspect ratio on grey."""
    tile = np.full((_TILE, _TILE, 3), 225, dtype=np.uint8)
    index = int(np.searchsorted(source.store.offsets, row, side="right")) - 1
    place = int(np.searchsorted(source.places[:, 0], index))
    try:
        image = read_image(source.images.record(int(source.places[place, 1])).path)
    except DataError:  # it could be read a while ago; a picture is not worth failing for
        return tile
    x1, y1, x2, y2 = (float(side) for side in source.store.boxes[row])
    margin = _CONTEXT * max(x2 - x1, y2 - y1)
    height, width = image.shape[:2]
    left, top = min(max(0, int(x1 - margin)), width - 1), min(max(0, int(y1 - margin)), height - 1)
    right, bottom = min(width, int(np.ceil(x2 + margin))), min(height, int(np.ceil(y2 + margin)))
    crop = image[top : max(bottom, top + 1), left : max(right, left + 1)]
    scale = _TILE / max(crop.shape[:2])
    small_hw = tuple(min(_TILE, max(1, round(side * scale))) for side in crop.shape[:2])
    small = cv2.resize(crop, small_hw[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    corners = [round((side - origin) * scale) for side, origin in ((x1, left), (y1, top), (x2, left), (y2, top))]
    cv2.rectangle(small, (corners[0], corners[1]), (corners[2] - 1, corners[3] - 1), (255, 230, 0), 1)
    down, across = (_TILE - small_hw[0]) // 2, (_TILE - small_hw[1]) // 2
    tile[down : down + small_hw[0], across : across + small_hw[1]] = small
    return tile
