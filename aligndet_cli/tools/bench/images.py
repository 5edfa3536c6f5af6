"""Images and boxes to measure with when the user has none: JPEG files of noise, and random boxes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.sample import mix_seed
from aligndet_cli.training.trial import striped_classes

# Heights and widths of COCO's photographs, with about their shares of train2017 in per cent.
SIZES_HW = {
    **{(480, 640): 26, (427, 640): 14, (640, 480): 9, (426, 640): 7, (375, 500): 7, (640, 427): 5, (640, 426): 3},
    **{(428, 640): 3, (425, 640): 3, (500, 375): 2, (640, 640): 2, (612, 612): 2, (333, 500): 2, (360, 640): 2},
    **{(424, 640): 2, (512, 640): 2, (640, 428): 2, (640, 425): 1, (640, 360): 1, (500, 333): 1, (640, 512): 1},
    **{(240, 640): 1, (480, 480): 1, (560, 640): 1},
}
NUM_LABELS = 7  # labelled boxes of an image of COCO, on average
NUM_CLASSES = 80
_NOISE_CELLS = (8, 2)  # two scales of noise, which together make files as large as COCO's (some 100 KB)
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class DrawnProposals:
    """`BoxSource` with as many random boxes for every image, the same ones each time."""

    image_set: ImageSet
    num_boxes: int
    num_classes: int

    def boxes_and_classes(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return (N, 4) xyxy boxes with sides of a twentieth to half of the image's shorter side, and (N,) classes."""
        side = int(self.image_set.sizes_hw[index].min())
        rng = np.random.default_rng(mix_seed(index))
        boxes = random_boxes(rng, self.num_boxes, (side, side))
        return boxes, rng.integers(self.num_classes, size=self.num_boxes)


@dataclass(frozen=True)
class DrawnPixelClasses:
    """`PixelClassSource` that gives the rows of each image classes in turns."""

    num_classes: int

    def classes_of(self, index: int, size_hw: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Return the class of every pixel of an image, (H, W)."""
        assert size_hw is not None, "the image has been read"
        return striped_classes(size_hw, self.num_classes)


def random_boxes(rng: np.random.Generator, count: int, size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Return `count` boxes, (N, 4) xyxy in pixels, with sides of a twentieth to half of the image's."""
    limits = np.array(size_hw[::-1], dtype=np.float32)
    sides = limits * rng.uniform(0.05, 0.5, (count, 2)).astype(np.float32)
    corners = (limits - sides) * rng.random((count, 2), dtype=np.float32)
    return np.concatenate([corners, corners + sides], axis=1)


def write_coco(folder: Path, num_images: int) -> None:
    """Write a COCO set of JPEGs in COCO's sizes, with labels and masks.

    The images are in `train/`, the labels in `annotations/instances_train.json`.
    """
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (height, width) in enumerate(mixed_sizes(num_images)):
        _write_noise(folder / "train" / f"{image_id:06d}.jpg", (height, width), rng)
        images.append({"id": image_id, "file_name": f"{image_id:06d}.jpg", "height": height, "width": width})
        for x1, y1, x2, y2 in random_boxes(rng, NUM_LABELS, (height, width)).tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.integers(NUM_CLASSES)) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [[x1, y1, x2, y1, (x1 + x2) / 2, y2]],
                }
            )
    categories = [{"id": number + 1, "name": f"class {number}"} for number in range(NUM_CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))


def mixed_sizes(count: int) -> list[tuple[int, int]]:
    """Return heights and widths of images, mixed as in COCO as closely as their number allows."""
    shares = np.cumsum(list(SIZES_HW.values()))
    places = np.searchsorted(shares, (np.arange(count) + 0.5) / count * shares[-1])
    sizes_hw = list(SIZES_HW)
    return [sizes_hw[place] for place in places]


def _write_noise(file: Path, size_hw: tuple[int, int], rng: np.random.Generator) -> None:
    height, width = size_hw
    pixels = np.zeros((height, width, 3))
    for cell in _NOISE_CELLS:
        coarse = rng.integers(0, 128, (-(-height // cell), -(-width // cell), 3), dtype=np.uint8)
        scaled = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
        pixels += np.asarray(scaled)
    Image.fromarray(pixels.astype(np.uint8)).save(file, quality=_JPEG_QUALITY)
