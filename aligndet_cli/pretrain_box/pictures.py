"""A picture of what pre-training sees: the two views of a few images, with the same proposals in the same colours."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aligndet_cli.data.loaders import SampleStream, StreamSampler
from aligndet_cli.data.transforms import MEAN, PLAIN_OPS, STD, ViewParams, make_batch
from aligndet_cli.errors import DataError
from aligndet_cli.files import write_bytes
from aligndet_cli.plotting import COLOURS, JPEG, hex_to_rgb, ink_on
from aligndet_cli.pretrain_box.views import VIEWS, draw_views
from aligndet_cli.processes.devices import Process

NUM_IMAGES = 4
NUM_BOXES = 12  # per image; more hide it, and each other
_TILE_HW = (330, 440)
_STRIP, _GAP = 24, 6  # pixels: of a line of text, between tiles
_WHITE, _INK = 255, (30, 30, 30)


def draw_first_views(
    file: Path,
    stream: SampleStream,
    *,
    short_sides: Sequence[int],
    long_side: int,
    seed: int,
    batch_size: int,
    count: int = NUM_IMAGES,
) -> None:
    """Write a JPEG of the two views of the first images that a run with these settings trains on, one row per image.

    Box i has the same colour and number on both sides and must lie on the same thing: a wrong transform shows at once.
    Of many proposals some are drawn, evenly spread over their sizes.

    Args:
        short_sides, long_side, seed, batch_size: as in training.

    Raises:
        DataError: an image cannot be read, and the stream does not skip it.
    """
    aspects, num_steps = stream.image_set.aspects(stream.indices), -(-count // batch_size)
    sampler = StreamSampler(aspects, batch_size, seed=seed, start_step=0, num_steps=num_steps, process=Process())
    rows = []
    for place in [place for batch in sampler for place in batch][:count]:
        sample = stream[place]
        if isinstance(sample, DataError):
            raise sample
        shown = _evenly_by_size(sample.boxes)
        tiles = []
        for number in VIEWS:
            [params] = draw_views([sample], number, short_sides, long_side, seed)
            images, [targets] = make_batch([sample], [params], torch.device("cpu"))
            height, width = images.sizes_hw[0]
            pixels = images.pixels[0, :, :height, :width]
            text = f"view {number}: {_describe(params, (height, width))}"
            tiles.append(_draw_tile(_to_uint8(pixels), targets.boxes[shown].numpy(), text))
        which = f"{len(shown)} of {len(sample.boxes)}" if len(shown) < len(sample.boxes) else f"all {len(shown)}"
        gap = np.full((tiles[0].shape[0], _GAP, 3), _WHITE, dtype=np.uint8)
        row = np.hstack([tiles[0], gap, tiles[1]])
        strip = np.full((_STRIP, row.shape[1], 3), _WHITE, dtype=np.uint8)
        rows += [_write(strip, f"{stream.image_set.file_names[sample.index]}: {which} proposals", 17), row]
    _, encoded = cv2.imencode(".jpg", np.vstack(rows)[..., ::-1], JPEG)
    write_bytes(file, encoded.tobytes())


def _evenly_by_size(boxes: Tensor) -> Tensor:
    """(n,) int64 indices of at most `NUM_BOXES` of (N, 4) boxes, largest first, evenly spread over their areas."""
    order = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).argsort(descending=True, stable=True)
    places = torch.linspace(0, max(len(order) - 1, 0), min(len(order), NUM_BOXES)).round().long()
    return order[places]


def _describe(params: ViewParams, size_hw: tuple[int, int]) -> str:
    colour = "" if params.colour == "identity" else f", {params.colour}"
    colour += "" if params.colour in PLAIN_OPS else f" {params.magnitude}"
    return f"{size_hw[1]}x{size_hw[0]}{', flipped' if params.flip else ''}{colour}"


def _to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """(3, h, w) normalised -> (h, w, 3) RGB."""
    mean, deviation = (torch.tensor(of).view(3, 1, 1) for of in (MEAN, STD))
    levels = ((pixels * deviation + mean) * 255).round().clamp(0, 255).byte()
    return np.ascontiguousarray(levels.permute(1, 2, 0).numpy())


def _draw_tile(image: NDArray[np.uint8], boxes: NDArray[np.float32], text: str) -> NDArray[np.uint8]:
    """(tile height + strip, tile width, 3) uint8 RGB: a view with (n, 4) boxes in its pixels and a line of text."""
    height, width = image.shape[:2]
    scale = min(_TILE_HW[1] / width, _TILE_HW[0] / height)
    small_hw = (max(1, round(height * scale)), max(1, round(width * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = np.asarray(cv2.resize(image, small_hw[::-1], interpolation=method), dtype=np.uint8)
    for draw in (_draw_box, _draw_number):  # no box over a number
        for number, box in enumerate(boxes * scale):
            draw(small, box, number)
    tile = np.full((_TILE_HW[0] + _STRIP, _TILE_HW[1], 3), _WHITE, dtype=np.uint8)
    left = (_TILE_HW[1] - small_hw[1]) // 2
    tile[: small_hw[0], left : left + small_hw[1]] = small
    return _write(tile, text, small_hw[0] + 16)


def _draw_box(image: NDArray[np.uint8], box: NDArray[np.float32], number: int) -> None:
    colour = hex_to_rgb(COLOURS[number % len(COLOURS)])
    x1, y1, x2, y2 = np.rint(box).astype(int).tolist()
    corners = (x1, y1), (max(x1, x2 - 1), max(y1, y2 - 1))
    cv2.rectangle(image, *corners, (0, 0, 0), 3)  # a dark rim keeps every colour visible on every background
    cv2.rectangle(image, *corners, colour, 2)


def _draw_number(image: NDArray[np.uint8], box: NDArray[np.float32], number: int) -> None:
    colour = hex_to_rgb(COLOURS[number % len(COLOURS)])
    x1, y1 = np.rint(box[:2]).astype(int).tolist()
    text = str(number + 1)
    (text_width, text_height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    left = min(max(x1, 0), image.shape[1] - text_width - 6)
    cv2.rectangle(image, (left, y1), (left + text_width + 5, y1 + text_height + 6), colour, -1)
    cv2.putText(image, text, (left + 3, y1 + text_height + 3), cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink_on(colour), 1)


def _write(image: NDArray[np.uint8], text: str, baseline: int) -> NDArray[np.uint8]:
    # cv2's font knows ASCII only and shows anything else as "??".
    text = text.encode("ascii", "replace").decode()
    cv2.putText(image, text, (4, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.45, _INK, 1, cv2.LINE_AA)
    return image
