"""Large arrays on disk, read and written a few thousand rows at a time, and marks of finished pieces of work."""

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
    """A (num_rows, num_columns) array on disk.

    Each call maps only its own rows into memory: a lasting mapping would count all pages it ever touched, in the end
    the whole file, as memory of the process.
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
        """Reserve the file's room on disk, so that a full disk is an error now and not a crash later.

        Raises:
            RunError: there is no room.
        """
        num_bytes = self.num_rows * self.row_bytes
        self.path.unlink(missing_ok=True)
        try:
            with self.path.open("wb") as handle:
                if num_bytes:
                    os.posix_fallocate(handle.fileno(), 0, num_bytes)
                os.fsync(handle.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self.path.unlink(missing_ok=True)
            raise RunError(
                f"{self.path}: no room for {num_bytes / 1e9:.3g} GB ({error.strerror}); "
                "free some space, or choose another disk with --workspace"
            ) from None

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of rows start:stop, (stop - start, num_columns)."""
        return np.array(self._map(start, stop, "r"))

    def read_ranges(self, ranges: Sequence[RowRange]) -> NDArray[Any]:
        """Return a copy of several ranges of rows, one below the other: (rows, num_columns)."""
        return np.concatenate([self.read(start, stop) for start, stop in ranges])

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Store (rows, num_columns) from row `start` on; they are on disk when this returns."""
        if len(rows):
            mapped = self._map(start, start + len(rows), "r+")
            mapped[:] = rows
            mapped.flush()

    def _map(self, start: int, stop: int, mode: Any) -> "np.memmap[Any, Any]":
        shape = (stop - start, self.num_columns)
        return np.memmap(self.path, dtype=self.dtype, mode=mode, offset=start * self.row_bytes, shape=shape)


@dataclass(frozen=True)
class DoneMarks:
    """One byte on disk per piece of work; several processes may mark different pieces in the same file."""

    path: Path
    count: int

    def create(self) -> None:
        """Create the file, with nothing marked as done."""
        write_bytes(self.path, bytes(self.count))

    def mark(self, index: int) -> None:
        """Mark a piece as done, once it is on disk."""
        with self.path.open("r+b", buffering=0) as handle:
            os.pwrite(handle.fileno(), b"\x01", index)
            os.fsync(handle)

    def read(self) -> NDArray[np.bool_]:
        """Return (N,) bool for N pieces: True if a piece is done."""
        return np.frombuffer(self.path.read_bytes(), dtype=np.uint8) == 1


@dataclass(frozen=True)
class Watch:
    """Progress display and stop signal of a long pass over rows."""

    progress: Progress
    stop: StopSignal

    def resumed(self, count: int) -> None:
        """Count units that an earlier run finished; they do not count for the speed of this run."""
        self.progress.start += count
        self.progress.done += count

    def finished(self, count: int) -> None:
        """Count units that are finished and saved.

        Raises:
            Preempted: the process was asked to stop.
        """
        self.progress.advance(count)
        self.stop.raise_if_requested()


def row_ranges(num_rows: int, size: int) -> list[RowRange]:
    """Return ranges of `size` rows that cover all rows; the last may be shorter."""
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def shuffled_batches(
    num_rows: int, batch_rows: int, rng: np.random.Generator, piece: int = 256
) -> list[list[RowRange]]:
    """Return the row ranges of batches of about `batch_rows` rows, each of random pieces, which cover all rows once.

    Rows of an image are neighbours in the file, so a batch of neighbouring rows would show few images, and a batch of
    single random rows would be slow to read. Pieces of 256 rows are a compromise: at least half a megabyte each, from
    some ten images. A short last piece is added to its neighbour, so no batch is tiny.
    """
    pieces = row_ranges(num_rows, min(piece, batch_rows))
    if len(pieces) > 1 and pieces[-1][1] - pieces[-1][0] < piece:
        pieces[-2:] = [(pieces[-2][0], pieces[-1][1])]
    order = [pieces[position] for position in rng.permutation(len(pieces))]
    per_batch = max(1, batch_rows // piece)
    batches = [order[start : start + per_batch] for start in range(0, len(order), per_batch)]
    if len(batches) > 1 and len(batches[-1]) < per_batch // 2:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def map_in_order(function: Callable[[Item], Value], items: Iterable[Item], num_threads: int) -> Iterator[Value]:
    """Yield `function(item)` in the order of the items, computed by threads, one item more in advance than they are.

    Unlike `joblib.Parallel(return_as="generator")`, it waits for the reader, so that results do not pile up in memory.
    With 0 threads the caller computes.
    """
    if num_threads == 0:
        yield from map(function, items)
        return
    remaining = iter(items)
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            waiting: list[Future[Value]] = [pool.submit(function, item) for item in islice(remaining, num_threads + 1)]
            while waiting:
                yield waiting.pop(0).result()
                waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
        finally:
            pool.shutdown(cancel_futures=True)
