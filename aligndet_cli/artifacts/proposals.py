"""Proposals of a whole data set in flat files that are mapped into memory, not loaded. Free of torch.

    boxes.npy      (M, 4) float32, xyxy, absolute pixels, best first within each image
    offsets.npy    (B + 1,) int64; boxes of image i are rows offsets[i]:offsets[i + 1]
    image_ids.npy  (B,) int64
    images.jsonl   one line per image, for people and for export: image_id, file_name, size_hw, count
    origins.npy    (M, 2) float32, only for boxes of a pre-trained run: score (0 for boxes that were merged with them),
                   and source (0 the run, 1 the merged proposals)

`images.jsonl` is read only where names or sizes are needed: opening and drawing boxes never parse it.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.arrays import save_array
from aligndet_cli.errors import DataError
from aligndet_cli.files import naming

STORE_FILES = ("boxes.npy", "offsets.npy", "image_ids.npy", "images.jsonl")
ORIGINS = "origins.npy"


@dataclass(frozen=True)
class ImageProposals:
    """The proposals of one image.

    Attributes:
        file_name: relative to the image folder.
        size_hw: height and width in pixels after EXIF rotation.
        boxes: (N, 4) float32, xyxy, absolute pixels, best first.
        origins: (N, 2) float32, as in `origins.npy`; None in a store without it.
    """

    image_id: int
    file_name: str
    size_hw: tuple[int, int]
    boxes: NDArray[np.float32]
    origins: NDArray[np.float32] | None = None


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


def write_store(folder: Path, images: Iterable[ImageProposals], *, with_origins: bool = False) -> None:
    """Write the files of a store, one image at a time: memory does not grow with the number of boxes."""
    counts: list[int] = []
    image_ids: list[int] = []
    lines_part = folder / ".images.jsonl.tmp"
    with naming(folder), contextlib.ExitStack() as stack:
        boxes_file = stack.enter_context(_GrowingArray(folder / "boxes.npy", num_columns=4))
        origins_file = stack.enter_context(_GrowingArray(folder / ORIGINS, num_columns=2)) if with_origins else None
        lines_file = stack.enter_context(lines_part.open("wb"))
        for image in images:
            boxes_file.append(image.boxes)
            if origins_file is not None:
                assert image.origins is not None, "a store with origins is made of images with origins"
                origins_file.append(image.origins)
            entry = ImageEntry(image.image_id, image.file_name, image.size_hw, len(image.boxes))
            lines_file.write((json.dumps(vars(entry)) + "\n").encode())
            counts.append(len(image.boxes))
            image_ids.append(image.image_id)
        lines_file.flush()
        os.fsync(lines_file.fileno())
    lines_part.replace(folder / "images.jsonl")
    save_array(folder / "offsets.npy", np.cumsum([0, *counts], dtype=np.int64))
    save_array(folder / "image_ids.npy", np.array(image_ids, dtype=np.int64))


class _GrowingArray:
    """A float32 `.npy` file that rows are appended to; it is there once the block has ended without an error."""

    def __init__(self, file: Path, num_columns: int) -> None:
        self._file, self._part = file, file.with_name(f".{file.name}.tmp")
        self._num_rows, self._num_columns = 0, num_columns

    def __enter__(self) -> Self:
        self._handle = self._part.open("wb")
        self._header_length = self._write_header()
        return self

    def append(self, rows: NDArray[np.float32]) -> None:
        """Append (N, columns) rows."""
        self._handle.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        self._num_rows += len(rows)

    def __exit__(self, kind: type[BaseException] | None, *_details: object) -> None:
        with self._handle as handle:
            if kind is not None:
                return
            # The number of rows is known only now. numpy pads headers so that the first axis can grow in place.
            handle.seek(0)
            if self._write_header() != self._header_length:
                raise AssertionError("the .npy header grew over the first rows")
            handle.flush()
            os.fsync(handle.fileno())
        self._part.replace(self._file)

    def _write_header(self) -> int:
        shape = (self._num_rows, self._num_columns)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._handle, header)
        return self._handle.tell()


def _load(file: Path, *, map_it: bool = False) -> NDArray:
    try:
        array: NDArray = np.load(file, mmap_mode="r" if map_it else None, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{file}: not found; run `aligndet proposals DATA` to make it") from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{file}: damaged ({error}); delete its folder and run `aligndet proposals` again") from None
    return array
