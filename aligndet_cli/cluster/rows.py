"""Large row arrays on disk, touched a few thousand rows at a time, and marks of which pieces are finished."""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.errors import RunError
from aligndet_cli.files import write_bytes
from aligndet_cli.logs import Progress
from aligndet_cli.processes.signals import StopSignal

Item = TypeVar("Item")
Value = TypeVar("Value")
RowRange = tuple[int, int]


@dataclass(frozen=True)
class RowFile:
    """A flat (num_rows, num_columns) array on disk.

    Only the rows of one call are ever mapped: a mapping kept open would count every page it ever touched as
    memory of the process, the whole file in the end.
    """

    path: Path
    dtype: str
    num_rows: int
    num_columns: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * self.num_columns

    def create(self) -> None:
        """Reserve the file's room on disk, so that a full disk shows now and not as a crash in the middle.

        Raises:
            RunError: no room.
        """
        _reserve(self.path, self.num_rows * self.row_bytes)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Copy of rows start:stop, (stop - start, num_columns)."""
        return np.array(self._map(start, stop, "r"))

    def read_ranges(self, ranges: Sequence[RowRange]) -> NDArray[Any]:
        """Copy of several ranges of rows, one below the other."""
        return np.concatenate([self.read(start, stop) for start, stop in ranges])

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Store rows from position `start` on; they are on disk when this returns."""
        if len(rows):
            mapped = self._map(start, start + len(rows), "r+")
            mapped[:] = rows
            mapped.flush()

    def _map(self, start: int, stop: int, mode: Any) -> "np.memmap[Any, Any]":
        shape = (stop - start, self.num_columns)
        return np.memmap(self.path, dtype=self.dtype, mode=mode, offset=start * self.row_bytes, shape=shape)


@dataclass(frozen=True)
class DoneMarks:
    """One byte on disk per piece of work; several processes may mark different pieces of the same file."""

    path: Path
    count: int

    def create(self) -> None:
        """Mark nothing as done."""
        write_bytes(self.path, bytes(self.count))

    def mark(self, index: int) -> None:
        """Mark a piece as done. Call it after the piece itself is on disk."""
        handle = os.open(self.path, os.O_WRONLY)
        try:
            os.pwrite(handle, b"\x01", index)
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self) -> NDArray[np.bool_]:
        """(count,) whether each piece is done."""
        return np.frombuffer(self.path.read_bytes(), dtype=np.uint8) == 1


@dataclass(frozen=True)
class Watch:
    """Whom a long pass reports to: what shows progress, and what may ask for a stop."""

    progress: Progress
    stop: StopSignal

    def resumed(self, count: int) -> None:
        """Count units that an earlier run finished: done, but not part of this run's speed."""
        self.progress.start += count
        self.progress.done += count

    def finished(self, count: int) -> None:
        """Count units that are finished and saved.

        Raises:
            Preempted: a stop was asked for.
        """
        self.progress.advance(count)
        self.stop.raise_if_requested()


def row_ranges(num_rows: int, size: int) -> list[RowRange]:
    """Ranges of `size` rows that cover all rows; the last may be shorter."""
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def shuffled_batches(
    num_rows: int, batch_rows: int, rng: np.random.Generator, piece: int = 256
) -> list[list[RowRange]]:
    """All rows once, in batches of about `batch_rows`, each put together from pieces out of random places.

    Rows of one image lie together in the file, so batches of neighbours would follow single images; single random
    rows would read the disk a few bytes at a time. Pieces of 256 rows are the compromise: half a megabyte or more
    each, from some ten images. The short last piece of the file joins a batch whole, so no batch is tiny.

    Returns:
        per batch, the ranges of rows to read.
    """
    pieces = row_ranges(num_rows, min(piece, batch_rows))
    if len(pieces) > 1 and pieces[-1][1] - pieces[-1][0] < piece:  # a short rest: hand it to its neighbour
        pieces[-2:] = [(pieces[-2][0], pieces[-1][1])]
    order = [pieces[position] for position in rng.permutation(len(pieces))]
    per_batch = max(1, batch_rows // piece)
    batches = [order[start : start + per_batch] for start in range(0, len(order), per_batch)]
    if len(batches) > 1 and len(batches[-1]) < per_batch // 2:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def map_in_order(
    function: Callable[[Item], Value], items: Iterable[Item], *, num_threads: int, ahead: int
) -> Iterator[Value]:
    """Yield `function(item)` in the order of the items, computed by threads at most `ahead` items in advance.

    The bound is why this is not `joblib.Parallel(return_as="generator")`, which runs on without waiting for the
    reader and piles up decoded images in memory. 0 threads compute in the caller.
    """
    if num_threads == 0:
        yield from map(function, items)
        return
    remaining = iter(items)
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            waiting: list[Future[Value]] = [pool.submit(function, item) for item in islice(remaining, ahead)]
            while waiting:
                yield waiting.pop(0).result()
                waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _reserve(path: Path, num_bytes: int) -> None:
    path.unlink(missing_ok=True)
    try:
        with path.open("wb") as handle:
            if num_bytes:
                os.posix_fallocate(handle.fileno(), 0, num_bytes)
            os.fsync(handle.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        path.unlink(missing_ok=True)
        raise RunError(
            f"{path}: no room for {num_bytes / 1e9:.3g} GB ({error.strerror}); "
            "free some space, or choose another disk with --workspace"
        ) from None
