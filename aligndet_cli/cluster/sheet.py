"""Pictures of clusters: their sizes, and a sheet of crops, the nearest to each centroid first."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from aligndet_cli.cluster.features import ProposalImages
from aligndet_cli.cluster.kmeans import Members
from aligndet_cli.data.images import read_image
from aligndet_cli.drawing import draw_grid, draw_text, draw_tile, save_picture
from aligndet_cli.errors import DataError
from aligndet_cli.plotting import COLOURS, REFERENCE, finish_axes, new_figure, save_figure

NUM_CLUSTERS, NUM_CROPS = 16, 8
_TILE_HW = (96, 96)
_TEXT_WIDTH = 132  # pixels
_COLOUR = "#F0E442"
_CONTEXT = 0.1  # margin around a box, as a share of its longer side


def draw_cluster_sheet(file: Path, source: ProposalImages, members: Members) -> None:
    """Write a JPEG with crops of the 16 largest clusters, in two columns; each crop shows its box."""
    largest = np.argsort(-members.sizes, kind="stable")[:NUM_CLUSTERS]
    strips = [_draw_strip(source, members, int(place)) for place in largest if members.sizes[place] > 0]
    half = (len(strips) + 1) // 2
    columns = [draw_grid(part, num_columns=1) for part in (strips[:half], strips[half:]) if part]
    save_picture(draw_grid(columns, num_columns=2), file)


def draw_sizes(file: Path, members: Members) -> None:
    """Write a PNG of the number of proposals per cluster, largest first, and of the mean."""
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
    """Return the rows of at most 8 proposals nearest to a cluster's centroid, from different images if possible.

    Neighbouring proposals of one image are nearly copies: eight of them would show one object, not a cluster.

    Args:
        offsets: (B + 1,) int64; the rows of image i are offsets[i]:offsets[i + 1].
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


def _draw_strip(source: ProposalImages, members: Members, cluster_id: int) -> Image.Image:
    """Return a row: number and size of a cluster, then its crops."""
    size = int(members.sizes[cluster_id])
    lines = (f"cluster {cluster_id}", f"{size:,} boxes", f"{size / len(members.labels):.1%} of all")
    crops = [_draw_crop(source, row) for row in nearest_rows(members, cluster_id, source.store.offsets)]
    return draw_grid([draw_text(lines, _TEXT_WIDTH), *crops], num_columns=1 + NUM_CROPS)


def _draw_crop(source: ProposalImages, row: int) -> Image.Image:
    """Return a tile with the crop around a proposal, at its own aspect ratio."""
    box = source.store.boxes[row].astype(np.float64)
    index = int(np.searchsorted(source.store.offsets, row, side="right")) - 1
    place = int(np.searchsorted(source.places[:, 0], index))
    try:
        image = read_image(source.images.record(int(source.places[place, 1])).path)
    except DataError:  # the image could be read a while ago; a picture is not worth failing for
        return draw_tile(None, box[None], _TILE_HW, colours=[_COLOUR])
    x1, y1, x2, y2 = box
    margin = _CONTEXT * max(x2 - x1, y2 - y1)
    height, width = image.shape[:2]
    left, top = min(max(0, int(x1 - margin)), width - 1), min(max(0, int(y1 - margin)), height - 1)
    right, bottom = max(int(np.ceil(x2 + margin)), left + 1), max(int(np.ceil(y2 + margin)), top + 1)
    inside = box - [left, top, left, top]
    return draw_tile(image[top:bottom, left:right], inside[None], _TILE_HW, colours=[_COLOUR])
