"""Maps with a class for every pixel of an image, as COCO-stuff's `stuffthingmaps`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.batch import NO_CLASS
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import read_size_hw, read_values
from aligndet_cli.errors import DataError

_NUM_READ = 50  # maps that `check` decodes; the others are checked when they are used


@dataclass(frozen=True)
class PixelMaps:
    """A folder with a PNG of 8 bits for each image of a set, called like it.

    Attributes:
        num_classes: P; pixels have 0..P-1, or `NO_CLASS`.
    """

    image_set: ImageSet
    folder: Path
    num_classes: int

    def check(self, indices: Sequence[int]) -> str:
        """Make sure that these images have maps of their size, and return a hash of the names and lengths of the files.

        The content of a few of them is looked at.

        Raises:
            DataError: one has not, or a class is out of range.
        """
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder of maps; check pixel_maps")
        missing = [file.name for file in map(self.file_of, indices) if not file.is_file()]
        if missing:
            hint = ""
            if len(missing) == len(indices):
                hint = "; name the folder with the maps of this split, such as stuffthingmaps/train2017"
            raise DataError(
                f"{self.folder}: {len(missing)} of {len(indices)} images have no map, the first is {missing[0]}{hint}"
            )
        self._check_sizes(indices)
        step = max(len(indices) // _NUM_READ, 1)
        for index in indices[::step]:
            self.classes_of(index)
        digest = hashlib.sha256()
        for file in map(self.file_of, indices):
            digest.update(f"{file.name}\0{file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def file_of(self, index: int) -> Path:
        """Return the map of an image."""
        return (self.folder / self.image_set.file_names[index]).with_suffix(".png")

    def classes_of(self, index: int, size_hw: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """Return the class of every pixel of an image, (H, W).

        Args:
            size_hw: of the image, if it is known.

        Raises:
            DataError: the map cannot be read, has another size, or a class that is out of range.
        """
        file = self.file_of(index)
        classes = read_values(file)
        if size_hw is not None and classes.shape != size_hw:
            raise DataError(f"{file}: {_other_size(classes.shape, size_hw)}")
        if (highest := classes[classes != NO_CLASS].max(initial=0)) >= self.num_classes:
            raise DataError(
                f"{file}: has a pixel of class {highest}, and detector.semantic_classes = {self.num_classes} means "
                f"0 to {self.num_classes - 1}, and {NO_CLASS} for none"
            )
        return classes

    def _check_sizes(self, indices: Sequence[int]) -> None:
        wrong = []
        for index in indices:
            said, file = self.image_set.record(index).size_hw, self.file_of(index)
            if said is not None and (found := read_size_hw(file)) != said:
                wrong.append(f"{file.name} {_other_size(found, said)}")
        if wrong:
            raise DataError(f"{self.folder}: {len(wrong)} of {len(indices)} maps have another size: {wrong[0]}")


def _other_size(found_hw: tuple[int, ...], size_hw: tuple[int, int]) -> str:
    return f"is {found_hw[1]}x{found_hw[0]} pixels, and its image {size_hw[1]}x{size_hw[0]}"
