"""Proposals of a whole data set in flat files that are mapped into memory, not loaded. Free of torch.

    boxes.npy      (M, 4) float32, xyxy, absolute pixels, best first within each image
    offsets.npy    (B + 1,) int64; boxes of image i are rows offsets[i]:offsets[i + 1]
    image_ids.npy  (B,) int64
    images.jsonl   one line per image, for people and for export: image_id, file_name, size_hw, count

`images.jsonl` is read only where names or sizes are needed: opening and drawing boxes never parse it.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.arrays import save_array
from aligndet_cli.errors import DataError
from aligndet_cli.files import naming

STORE_FILES = ("boxes.npy", "offsets.npy", "image_ids.npy", "images.jsonl")


@dataclass(frozen=True)
class ImageProposals:
    """The proposals of one image.

    Attributes:
        file_name: relative to the image folder.
        size_hw: height and width in pixels after EXIF rotation.
        boxes: (N, 4) float32, xyxy, absolute pixels, best first.
    """

    image_id: int
    file_name: str
    size_hw: tuple[int, int]
    boxes: NDArray[np.float32]


@dataclass(frozen=True)
class ImageEntry:
    """One line of `images.jsonl`; fields as in `ImageProposals`, with the number of boxes."""

    image_id: int
    file_name: str
    size_hw: tuple[int, int]
    count: int


class ProposalStore:
    """Read access to a folder of proposals. B = images, M = boxes in all.

    Opening reads two small arrays and maps the boxes. A process that receives a pickled store maps the same file
    again, so all processes share one copy of the pages in use.

    Attributes:
        boxes: (M, 4) float32 memory map, xyxy, absolute pixels.
        offsets: (B + 1,) int64; boxes of image i are rows offsets[i]:offsets[i + 1].
        image_ids: (B,) int64, in the order of the data set; see `positions_of` to find images by id.

    Raises:
        DataError: files are missing, damaged or of different runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.boxes: NDArray[np.float32] = _load(folder / "boxes.npy", map_it=True)
        self.offsets: NDArray[np.int64] = _load(folder / "offsets.npy")
        self.image_ids: NDArray[np.int64] = _load(folder / "image_ids.npy")
        num_expected = int(self.offsets[-1])
        if len(self.offsets) != len(self.image_ids) + 1 or num_expected != len(self.boxes):
            raise DataError(
                f"{folder}: its files do not belong together; delete the folder and run `aligndet proposals`"
            )

    def __reduce__(self) -> tuple[type["ProposalStore"], tuple[Path]]:
        return ProposalStore, (self.folder,)

    def __len__(self) -> int:
        """Return the number of images, including images without proposals."""
        return len(self.image_ids)

    @property
    def total(self) -> int:
        """Number of proposals of all images."""
        return len(self.boxes)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of proposals per image (B,) int64."""
        return np.diff(self.offsets)

    def boxes_of(self, index: int) -> NDArray[np.float32]:
        """Return boxes (N, 4) float32 xyxy of the image at a position, best first, as a read-only view of the map.

        Raises:
            IndexError: no image at that position.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        view: NDArray[np.float32] = np.asarray(self.boxes[self.offsets[index] : self.offsets[index + 1]])
        return view

    def images(self) -> Iterator[ImageEntry]:
        """Yield ids, names and sizes in the order of the store, read line by line."""
        with (self.folder / "images.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                yield ImageEntry(**{**entry, "size_hw": tuple(entry["size_hw"])})


def write_store(folder: Path, images: Iterable[ImageProposals]) -> None:
    """Write the four files of a store, one image at a time: memory does not grow with the number of boxes."""
    counts: list[int] = []
    image_ids: list[int] = []
    boxes_part, lines_part = folder / ".boxes.npy.tmp", folder / ".images.jsonl.tmp"
    with naming(folder), boxes_part.open("wb") as boxes_file, lines_part.open("wb") as lines_file:
        header_length = _write_header(boxes_file, num_rows=0)
        for image in images:
            boxes_file.write(np.ascontiguousarray(image.boxes, dtype="<f4").tobytes())
            entry = ImageEntry(image.image_id, image.file_name, image.size_hw, len(image.boxes))
            lines_file.write((json.dumps(vars(entry)) + "\n").encode())
            counts.append(len(image.boxes))
            image_ids.append(image.image_id)
        # The number of rows is known only now. numpy pads headers so that the first axis can grow in place.
        boxes_file.seek(0)
        if _write_header(boxes_file, num_rows=sum(counts)) != header_length:
            raise AssertionError("the .npy header grew over the first boxes")
        for handle in (boxes_file, lines_file):
            handle.flush()
            os.fsync(handle.fileno())
    boxes_part.replace(folder / "boxes.npy")
    lines_part.replace(folder / "images.jsonl")
    save_array(folder / "offsets.npy", np.cumsum([0, *counts], dtype=np.int64))
    save_array(folder / "image_ids.npy", np.array(image_ids, dtype=np.int64))


def _write_header(handle: BinaryIO, num_rows: int) -> int:
    header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, 4)}
    np.lib.format.write_array_header_1_0(handle, header)
    return handle.tell()


def _load(file: Path, *, map_it: bool = False) -> NDArray:
    try:
        array: NDArray = np.load(file, mmap_mode="r" if map_it else None, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{file}: not found; run `aligndet proposals DATA` to make it") from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{file}: damaged ({error}); delete its folder and run `aligndet proposals` again") from None
    return array
