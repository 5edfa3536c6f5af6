"""A picture of the two views of a few images, with the same proposals in the same colours."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aligndet_cli.data.loaders import SampleStream, StreamSampler
from aligndet_cli.data.transforms import MEAN, PLAIN_OPS, STD, ViewParams, make_batch
from aligndet_cli.drawing import draw_grid, draw_text, draw_tile, save_picture
from aligndet_cli.plotting import COLOURS
from aligndet_cli.pretrain_box.views import VIEWS, ViewsConfig, draw_views
from aligndet_cli.processes.devices import Process

NUM_IMAGES = 4
NUM_BOXES = 12  # per image; more hide it, and each other
_TILE_HW = (330, 440)


def draw_first_views(
    file: Path, stream: SampleStream, resolution: ViewsConfig, *, seed: int, batch_size: int, count: int = NUM_IMAGES
) -> None:
    """Write a JPEG of the two views of the first images that a run with these settings trains on, one row per image.

    A proposal has the same colour and number in both views, and must lie on the same object, so that a wrong transform
    shows at once. Of many proposals, a few are drawn, evenly spread over their sizes.

    Raises:
        DataError: an image cannot be read, and the stream does not skip it.
    """
    aspects, num_steps = stream.image_set.aspects(stream.indices), -(-count // batch_size)
    sampler = StreamSampler(aspects, batch_size, seed=seed, start_step=0, num_steps=num_steps, process=Process())
    rows = []
    for place in [place for batch in sampler for place in batch][:count]:
        sample = stream[place]
        shown = _evenly_by_size(sample.boxes)
        colours = (NUM_BOXES * COLOURS)[: len(shown)]
        numbers = [str(place + 1) for place in range(len(shown))]
        tiles = []
        for number in VIEWS:
            [params] = draw_views([sample], number, resolution, seed)
            images, [targets] = make_batch([sample], [params], torch.device("cpu"))
            height, width = images.sizes_hw[0]
            pixels = _to_uint8(images.pixels[0, :, :height, :width])
            line = f"view {number}: {_describe(params, (height, width))}"
            boxes = targets.boxes[shown].numpy()
            tiles.append(draw_tile(pixels, boxes, _TILE_HW, colours=colours, labels=numbers, lines=[line]))
        which = f"{len(shown)} of {len(sample.boxes)}" if len(shown) < len(sample.boxes) else f"all {len(shown)}"
        views = draw_grid(tiles, num_columns=2)
        rows += [draw_text([f"{stream.image_set.file_names[sample.index]}: {which} proposals"], views.width), views]
    save_picture(draw_grid(rows, num_columns=1, gap=0), file)


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
