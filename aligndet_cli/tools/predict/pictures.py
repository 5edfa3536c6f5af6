"""Annotated copies of images, and what was found cut out of them."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aligndet_cli.data.dataset import Category, ImageSet, class_labels, one_line
from aligndet_cli.data.images import read_image
from aligndet_cli.files import naming
from aligndet_cli.plotting import never_failing
from aligndet_cli.tools.predict.annotate import annotate

IMAGES, CROPS = "images", "crops"
_LONGEST_FOLDER = 55  # letters of a class name, each of 4 bytes at most, before an id that makes it unique
_DRAWN_AHEAD = 8  # images that may wait to be drawn while detection goes on


class Pictures:
    """Pictures of detections, drawn in other threads while detection goes on.

    Args:
        image_set: the images.
        folder: where `images/` and `crops/` go.
        categories: classes, whose order decides the colours.
        pool: threads.
        annotated: draw copies of the images.
        save_crops: cut out what was found.
    """

    def __init__(
        self,
        image_set: ImageSet,
        folder: Path,
        categories: Sequence[Category],
        pool: ThreadPoolExecutor,
        *,
        annotated: bool,
        save_crops: bool,
    ) -> None:
        self.image_set, self.folder, self.categories, self.pool = image_set, folder, categories, pool
        self.annotated, self.save_crops = annotated, save_crops
        self.labels = class_labels({category.category_id: category.name for category in categories})
        self.folders = class_labels({category.category_id: _folder_name(category.name) for category in categories})
        self.pending: list[Future[None]] = []

    def draw(self, index: int, entries: Sequence[dict[str, Any]]) -> None:
        """Draw an image soon; wait first if too many images are waiting."""
        if self.annotated or (self.save_crops and entries):
            self.pending.append(self.pool.submit(self._draw, index, entries))
            if len(self.pending) > _DRAWN_AHEAD:
                self.pending.pop(0).result()

    def finish(self) -> None:
        """Wait for all images."""
        for drawn in self.pending:
            drawn.result()

    def _draw(self, index: int, entries: Sequence[dict[str, Any]]) -> None:
        record = self.image_set.record(index)
        with never_failing(record.path):
            pixels = read_image(record.path)
            if self.annotated:
                _save(annotate(pixels, entries, self.categories), self.folder / IMAGES / record.file_name)
            if self.save_crops:
                self.cut_out(pixels, entries, record.file_name)

    def cut_out(self, pixels: NDArray[np.uint8], entries: Sequence[dict[str, Any]], file_name: str) -> None:
        """Write what was found in an image, one file for each."""
        for number, entry in enumerate(entries, start=1):
            self._save_crop(pixels, entry, f"{file_name}-{number}")

    def _save_crop(self, pixels: NDArray[np.uint8], entry: dict[str, Any], name: str) -> None:
        x, y, width, height = entry["bbox"]
        left, top = int(x), int(y)
        crop = pixels[top : max(int(np.ceil(y + height)), top + 1), left : max(int(np.ceil(x + width)), left + 1)]
        if crop.size:  # a box may be nothing but the border
            _save(Image.fromarray(crop), self.folder / CROPS / self.folders[entry["category_id"]] / name)


def _folder_name(name: str) -> str:
    return one_line(name).replace("/", "_").strip(". ")[:_LONGEST_FOLDER].strip(". ") or "_"


def _save(image: Image.Image, file: Path) -> None:
    """Write a JPEG: `a.jpg` stays `a.jpg`, `a.png` becomes `a.png.jpg`, so that neither replaces the other."""
    if file.suffix.lower() not in (".jpg", ".jpeg"):
        file = file.with_name(f"{file.name}.jpg")
    save_jpeg(image, file)


def save_jpeg(image: Image.Image, file: Path) -> None:
    """Write a JPEG, and the folders it is in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with naming(file):
        image.save(file, format="JPEG", quality=90)
