"""Finished images on disk while the stage runs: append-only files that a crash can only cut short.

Each writer has a file of its own, `<share>.log`, and holds its lock while it runs. A record per image:

    checksum     uint32, CRC-32 of all that follows
    num_boxes    uint32
    reason_size  uint32, bytes of `reason`
    height       uint32, width uint32
    position     uint64, of the image in the data set
    digest       uint64, of the image file
    boxes        num_boxes x 4 float32, xyxy
    reason       UTF-8, why the image was left out; empty for one that was not

What follows the first record that is not whole is ignored, and cut off before anything is appended.
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
from aligndet_cli.files import try_lock

_HEADER = struct.Struct("<IIIIIQQ")
_CHECKSUM_SIZE = 4
# A killed process loses nothing that was appended; only a machine that loses power can lose this many seconds.
_SYNC_SECONDS = 1.0
_MISSING, _SKIPPED, _USABLE = 0, 1, 2


@dataclass(frozen=True)
class Found:
    """What came of one image.

    Attributes:
        position: of the image in the data set.
        size_hw: height and width in pixels after EXIF rotation; (0, 0) if it was left out.
        boxes: (N, 4) float32, xyxy, absolute pixels, best first.
        digest: of the bytes of the file; equal files have equal ones.
        reason: why the image was left out; empty if it was not.
    """

    position: int
    size_hw: tuple[int, int]
    boxes: NDArray[np.float32]
    digest: int
    reason: str = ""


class Journal:
    """A file that finished images are appended to. Use `Journal.open`."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._synced = time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def open(cls, file: Path) -> Iterator[Self]:
        """A journal that goes on behind the last whole record of `file`, which this process alone may write.

        Raises:
            RunError: another process writes it.
        """
        with file.open("ab+", buffering=0) as handle:
            if not try_lock(handle, fcntl.LOCK_EX):
                raise RunError(f"share {file.stem}: another aligndet process is working on it; wait for it")
            handle.truncate(_end_of_records(file))
            journal = cls(handle)
            try:
                yield journal
            finally:
                os.fsync(handle.fileno())

    def append(self, found: Found) -> None:
        """Keep a finished image: from now on no crash of a process loses it."""
        self._handle.write(_encode(found))
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            os.fsync(self._handle.fileno())
            self._synced = time.monotonic()


class Records:
    """All finished images of a folder of journals, found by their position in the data set.

    In memory are 13 bytes per image; boxes are read when they are asked for. An image that was done by several
    writers is read from one of them, preferably from one that did not leave it out.
    """

    def __init__(self, folder: Path, num_images: int) -> None:
        self._files = sorted(folder.glob("*.log"))
        self._state = np.zeros(num_images, dtype=np.uint8)
        self._file = np.zeros(num_images, dtype=np.int32)
        self._offset = np.zeros(num_images, dtype=np.int64)
        for number, file in enumerate(self._files):
            with file.open("rb") as handle:
                for offset, found in _whole_records(handle):
                    state = _SKIPPED if found.reason else _USABLE
                    if state > self._state[found.position]:
                        self._state[found.position] = state
                        self._file[found.position], self._offset[found.position] = number, offset

    def missing(self, *, skipped_too: bool = False) -> NDArray[np.int64]:
        """Ascending positions of the images that are not done; `skipped_too` counts those left out as not done."""
        return np.flatnonzero(self._state < (_USABLE if skipped_too else _SKIPPED))

    def in_order(self) -> Iterator[Found]:
        """Finished images in the order of the data set."""
        with contextlib.ExitStack() as stack:
            handles = [stack.enter_context(file.open("rb")) for file in self._files]
            for position in np.flatnonzero(self._state):
                handle = handles[self._file[position]]
                handle.seek(self._offset[position])
                found = _read(handle)
                if found is None:
                    raise AssertionError(f"record of image {position} was whole and is not any more")
                yield found


def _encode(found: Found) -> bytes:
    reason = found.reason.encode()
    height, width = found.size_hw
    boxes = np.ascontiguousarray(found.boxes, dtype="<f4").tobytes()
    header = _HEADER.pack(0, len(found.boxes), len(reason), height, width, found.position, found.digest)
    rest = header[_CHECKSUM_SIZE:] + boxes + reason
    return struct.pack("<I", zlib.crc32(rest)) + rest


def _read(handle: BinaryIO) -> Found | None:
    """The record at the place of `handle`; None where there is no whole one."""
    header = handle.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    checksum, num_boxes, reason_size, height, width, position, digest = _HEADER.unpack(header)
    boxes_size = 16 * num_boxes
    if boxes_size + reason_size > os.fstat(handle.fileno()).st_size:  # no sense in asking for that much memory
        return None
    body = handle.read(boxes_size + reason_size)
    if len(body) < boxes_size + reason_size or zlib.crc32(body, zlib.crc32(header[_CHECKSUM_SIZE:])) != checksum:
        return None
    boxes = np.frombuffer(body, dtype="<f4", count=4 * num_boxes).reshape(-1, 4)
    return Found(position, (height, width), boxes, digest, body[boxes_size:].decode())


def _whole_records(handle: BinaryIO) -> Iterator[tuple[int, Found]]:
    """Offsets and records from the beginning; ends with `handle` anywhere behind the last whole one."""
    offset = handle.tell()
    while (found := _read(handle)) is not None:
        yield offset, found
        offset = handle.tell()


def _end_of_records(file: Path) -> int:
    """Offset behind the last whole record."""
    end = 0
    with file.open("rb") as handle:
        for _ in _whole_records(handle):
            end = handle.tell()
    return end
