"""Finished images on disk while the stage runs, in append-only files that a crash can only cut short.

Each writer has a file of its own, `<share>.log`, and holds its lock while it runs. It appends a record per image:

    checksum     uint32, CRC-32 of all that follows
    num_boxes    uint32
    reason_size  uint32, bytes of `reason`
    height       uint32, width uint32
    position     uint64, of the image in the data set
    digest       uint64, of the image file
    boxes        num_boxes x 4 float32, xyxy
    origins      num_boxes x 2 float32, in the journals of boxes from a run; see `ImageResult`
    reason       UTF-8, why the image was left out; empty if it was not

Everything from the first incomplete record on is ignored, and cut off before a writer appends.
"""

import contextlib
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.errors import RunError
from aligndet_cli.files import naming, try_lock

_HEADER = struct.Struct("<IIIIIQQ")
_CHECKSUM_SIZE = 4
# A killed process loses nothing that was appended; a machine that loses power loses at most this many seconds.
_SYNC_SECONDS = 1.0
_MISSING, _SKIPPED, _USABLE = 0, 1, 2


@dataclass(frozen=True)
class ImageResult:
    """Result of one image.

    Attributes:
        position: of the image in the data set.
        size_hw: height and width in pixels after EXIF rotation; (0, 0) if it was left out.
        boxes: (N, 4) float32, xyxy, absolute pixels, best first.
        digest: hash of the bytes of the image file.
        reason: why the image was left out; empty if it was not.
        origins: (N, 2) float32 score and source of boxes from a run, see `rounds.merge_boxes`; None for other boxes.
    """

    position: int
    size_hw: tuple[int, int]
    boxes: NDArray[np.float32]
    digest: int
    reason: str = ""
    origins: NDArray[np.float32] | None = None


class Journal:
    """File that finished images are appended to. Use `Journal.open`."""

    def __init__(self, file: Path, handle: BinaryIO) -> None:
        self._file, self._handle = file, handle
        self._synced = time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def open(cls, file: Path, *, with_origins: bool = False) -> Iterator[Self]:
        """Open a file for appending behind its last complete record; no other process can while the block lasts.

        Args:
            with_origins: its results have origins, unless they left the image out.

        Raises:
            RunError: another process writes it.
        """
        with file.open("ab+", buffering=0) as handle:
            if not try_lock(handle, fcntl.LOCK_EX):
                raise RunError(f"share {file.stem}: another aligndet process is working on it; wait for it")
            handle.truncate(_end_of_records(file, with_origins))
            journal = cls(file, handle)
            try:
                yield journal
            finally:
                os.fsync(handle.fileno())

    def append(self, result: ImageResult) -> None:
        """Write a finished image; from then on no crash of a process loses it."""
        with naming(self._file):
            left = memoryview(_encode(result))
            while left:  # the last bytes of a disk take a part of it
                left = left[self._handle.write(left) :]
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                os.fsync(self._handle.fileno())
                self._synced = time.monotonic()


class Journals:
    """All finished images in a folder of journals, by position in the data set.

    An image takes 13 bytes of memory; its boxes are read on demand. If several writers did the same image, a record
    with boxes is preferred to one that left it out.
    """

    def __init__(self, folder: Path, num_images: int, *, with_origins: bool = False) -> None:
        self.with_origins = with_origins
        self._files = sorted(folder.glob("*.log"))
        self._state = np.zeros(num_images, dtype=np.uint8)
        self._file = np.zeros(num_images, dtype=np.int32)
        self._offset = np.zeros(num_images, dtype=np.int64)
        for number, file in enumerate(self._files):
            with file.open("rb") as handle:
                for offset, result in _whole_records(handle, with_origins):
                    state = _SKIPPED if result.reason else _USABLE
                    if state > self._state[result.position]:
                        self._state[result.position] = state
                        self._file[result.position], self._offset[result.position] = number, offset

    def missing(self, *, skipped_too: bool = False) -> NDArray[np.int64]:
        """Return the ascending (M,) positions of images that are not done, or also left out with `skipped_too`."""
        return np.flatnonzero(self._state < (_USABLE if skipped_too else _SKIPPED))

    def in_order(self) -> Iterator[ImageResult]:
        """Yield the finished images in the order of the data set."""
        with contextlib.ExitStack() as stack:
            handles = [stack.enter_context(file.open("rb")) for file in self._files]
            for position in np.flatnonzero(self._state):
                handle = handles[self._file[position]]
                handle.seek(self._offset[position])
                result = _read(handle, self.with_origins)
                assert result is not None, f"record of image {position} was whole and is not any more"
                yield result


def _encode(result: ImageResult) -> bytes:
    reason = result.reason.encode()
    height, width = result.size_hw
    boxes = np.ascontiguousarray(result.boxes, dtype="<f4").tobytes()
    if result.origins is not None:
        boxes += np.ascontiguousarray(result.origins, dtype="<f4").tobytes()
    header = _HEADER.pack(0, len(result.boxes), len(reason), height, width, result.position, result.digest)
    rest = header[_CHECKSUM_SIZE:] + boxes + reason
    return struct.pack("<I", zlib.crc32(rest)) + rest


def _read(handle: BinaryIO, with_origins: bool) -> ImageResult | None:
    """Read the record at the position of `handle`; None if it is incomplete."""
    header = handle.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    checksum, num_boxes, reason_size, height, width, position, digest = _HEADER.unpack(header)
    boxes_size = (24 if with_origins else 16) * num_boxes
    if boxes_size + reason_size > os.fstat(handle.fileno()).st_size:  # no sense in asking for that much memory
        return None
    body = handle.read(boxes_size + reason_size)
    if len(body) < boxes_size + reason_size or zlib.crc32(body, zlib.crc32(header[_CHECKSUM_SIZE:])) != checksum:
        return None
    boxes = np.frombuffer(body, dtype="<f4", count=4 * num_boxes).reshape(-1, 4)
    reason, origins = body[boxes_size:].decode(), None
    if with_origins and not reason:
        origins = np.frombuffer(body, dtype="<f4", count=2 * num_boxes, offset=16 * num_boxes).reshape(-1, 2)
    return ImageResult(position, (height, width), boxes, digest, reason, origins)


def _whole_records(handle: BinaryIO, with_origins: bool) -> Iterator[tuple[int, ImageResult]]:
    """Yield offset and content of the complete records, from the position of `handle` on."""
    offset = handle.tell()
    while (result := _read(handle, with_origins)) is not None:
        yield offset, result
        offset = handle.tell()


def _end_of_records(file: Path, with_origins: bool) -> int:
    """Return the offset behind the last complete record."""
    with file.open("rb") as handle:
        return max((handle.tell() for _ in _whole_records(handle, with_origins)), default=0)
