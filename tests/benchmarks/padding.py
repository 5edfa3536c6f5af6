"""How much of a batch is padding, with images in random order (before) and batches of one orientation (after).

    python tests/benchmarks/padding.py path/to/data [--split train] [--epochs 20] [--seeds 5] [--batches 16x1 16x2]

Padded by content pixels, of all batches of all epochs and seeds together, from the sizes of the images alone; order,
resolutions and views are those of `pretrain-box` and `finetune`. `16x2`: 16 images on 2 processes.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.config import DataConfig
from aligndet_cli.data.batch import PAD_DIVISOR
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import read_missing_sizes
from aligndet_cli.data.loaders import StreamSampler
from aligndet_cli.data.open import open_images
from aligndet_cli.data.transforms import draw_view, resized_hw
from aligndet_cli.finetune.views import (
    ResolutionConfig,
    draw_labelled_view,
    resolve_resolution,
)
from aligndet_cli.pretrain_box.views import ViewsConfig
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.recipe import MULTI_SCALE, SINGLE_SCALE

SIDES = ("finetune, one scale", "finetune, multi-scale", "pretrain-box, a view")


def view_hw(side: str, seed: int, position: int, size_hw: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image after what a side does to it at a place of the stream."""
    if side == SIDES[2]:
        views = ViewsConfig()
        view = draw_view((seed, position, 1), views.short_side, views.long_side, with_colour=True)
    else:
        scales = SINGLE_SCALE if side == SIDES[0] else MULTI_SCALE
        resolution = resolve_resolution(ResolutionConfig(), "resize", scales)
        _, view = draw_labelled_view((seed, position), size_hw, resolution)
    return resized_hw(size_hw, view.short_side, view.long_side)


def padding(
    side: str,
    sizes_hw: list[tuple[int, int]],
    aspects: NDArray[np.float64],
    batch: tuple[int, int],
    seeds: int,
    epochs: int,
) -> float:
    """Padded by content pixels of batches of (images, processes)."""
    padded, content = 0, 0
    batch_size, num_processes = batch
    for seed in range(seeds):
        num_steps = epochs * len(sizes_hw) // batch_size
        for rank in range(num_processes):
            process = Process(rank=rank, world_size=num_processes)
            sampler = StreamSampler(aspects, batch_size, seed=seed, start_step=0, num_steps=num_steps, process=process)
            for places in sampler:
                shapes = [view_hw(side, seed, position, sizes_hw[row]) for position, row in places]
                height, width = (
                    math.ceil(max(sides) / PAD_DIVISOR) * PAD_DIVISOR for sides in zip(*shapes, strict=True)
                )
                padded += len(shapes) * height * width
                content += sum(height * width for height, width in shapes)
    return padded / content


def read(folder: Path, split: str | None) -> ImageSet:
    """A training set; the sizes of a plain folder in `sizes_hw`, too."""
    images = open_images(DataConfig(root=folder, split=split), purpose="train")
    images.sizes_hw[:] = read_missing_sizes(images.images_dir, images.file_names, images.sizes_hw)
    return images


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batches", nargs="+", default=["16x1", "8x1", "2x1", "16x2"])
    arguments = parser.parse_args()
    images = read(arguments.data, arguments.split)
    aspects = images.aspects(range(len(images)))
    sizes_hw = [(int(height), int(width)) for height, width in images.sizes_hw if height]
    aspects = aspects[images.sizes_hw[:, 0] > 0]
    print(f"{len(sizes_hw)} images, {np.mean(aspects > 1):.0%} wide; padded by content pixels")
    print(f"{'images x processes':24}" + "".join(f"{side:>24}" for side in SIDES))
    for text in arguments.batches:
        batch = tuple(int(part) for part in text.split("x"))
        cells = []
        for side in SIDES:
            before, after = (
                padding(side, sizes_hw, shapes, batch, arguments.seeds, arguments.epochs)
                for shapes in (np.ones_like(aspects), aspects)
            )
            cells.append(f"{before:.2f} -> {after:.2f}")
        print(f"{text:24}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
