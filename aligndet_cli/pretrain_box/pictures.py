"""A picture of the views of a few images, with the same boxes in the same colours."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aligndet_cli.data.loaders import SampleStream, StreamSampler
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import MEAN, PLAIN_OPS, STD, ViewParams, make_batch
from aligndet_cli.drawing import draw_grid, draw_text, draw_tile, save_picture
from aligndet_cli.plotting import COLOURS
from aligndet_cli.pretrain_box.method import Shown, ShownView
from aligndet_cli.pretrain_box.views import ALL_CHANGES, ViewChanges, ViewsConfig, draw_views
from aligndet_cli.processes.devices import Process

NUM_IMAGES = 4
NUM_BOXES = 12  # per image; more hide it, and each other
_TILE_HW = (330, 440)


def draw_first_views(
    file: Path,
    stream: SampleStream,
    show: Callable[[Sample], Shown],
    *,
    seed: int,
    batch_size: int,
    count: int = NUM_IMAGES,
) -> None:
    """Write a JPEG of the views of the first images that a run with these settings trains on, one row per image.

    A box has the same colour and number in all views, and must lie on the same object, so that a wrong transform
    shows at once. Of many boxes, a few are drawn, evenly spread over their sizes.

    Raises:
        DataError: an image cannot be read, and the stream does not skip it.
    """
    aspects, num_steps = stream.image_set.aspects(stream.indices), -(-count // batch_size)
    sampler = StreamSampler(aspects, batch_size, seed=seed, start_step=0, num_steps=num_steps, process=Process())
    rows = []
    for place in [place for batch in sampler for place in batch][:count]:
        sample = stream[place]
        of_image = show(sample)
        shown = _evenly_by_size(of_image.boxes)
        colours = (NUM_BOXES * COLOURS)[: len(shown)]
        numbers = [str(place + 1) for place in range(len(shown))]
        tiles = [
            draw_tile(
                _to_uint8(view.pixels),
                view.boxes[shown].numpy(),
                _TILE_HW,
                colours=colours,
                labels=numbers,
                lines=[f"view {number}: {view.text}"],
            )
            for number, view in enumerate(of_image.views, start=1)
        ]
        num_boxes, kind = len(of_image.boxes), of_image.kind
        which = f"{len(shown)} of {num_boxes}" if len(shown) < num_boxes else f"all {num_boxes}"
        views = draw_grid(tiles, num_columns=len(tiles))
        rows += [draw_text([f"{stream.image_set.file_names[sample.index]}: {which} {kind}"], views.width), views]
    save_picture(draw_grid(rows, num_columns=1, gap=0), file)


def show_views(
    sample: Sample, resolution: ViewsConfig, seed: int, numbers: Sequence[int], changes: ViewChanges = ALL_CHANGES
) -> Shown:
    """Return the views of these numbers, see `draw_views`, with the proposals on them."""
    views = []
    for number in numbers:
        [params] = draw_views([sample], number, resolution, seed, changes)
        images, [targets] = make_batch([sample], [params], torch.device("cpu"))
        height, width = images.sizes_hw[0]
        pixels = images.pixels[0, :, :height, :width]
        views.append(ShownView(pixels, targets.boxes, _describe(params, (height, width))))
    return Shown(sample.boxes, views)


def _evenly_by_size(boxes: Tensor) -> Tensor:
    """Return (n,) int64 indices of at most `NUM_BOXES` of (N, 4) boxes, largest first, evenly spread by rank."""
    order = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).argsort(descending=True, stable=True)
    places = torch.linspace(0, max(len(order) - 1, 0), min(len(order), NUM_BOXES)).round().long()
    return order[places]


def _describe(params: ViewParams, size_hw: tuple[int, int]) -> str:
    colour = "" if params.colour == "identity" else f", {params.colour}"
    colour += "" if params.colour in PLAIN_OPS else f" {params.magnitude}"
    return f"{size_hw[1]}x{size_hw[0]}{', flipped' if params.flip else ''}{colour}"


def _to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """Return an (h, w, 3) uint8 RGB image of (3, h, w) normalised pixels."""
    mean, deviation = (torch.tensor(of).view(3, 1, 1) for of in (MEAN, STD))
    levels = ((pixels * deviation + mean) * 255).round().clamp(0, 255).byte()
    return np.ascontiguousarray(levels.permute(1, 2, 0).numpy())
