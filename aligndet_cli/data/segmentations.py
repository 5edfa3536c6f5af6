"""Masks of boxes as one block of bytes, which is far smaller than nested lists and can be mapped from a file."""

import itertools
import json
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.mask_forms import Form, form_of
from aligndet_cli.errors import DataError

# Run-length codes made by pycocotools hold bytes.
_encode = json.JSONEncoder(separators=(",", ":"), default=lambda value: bytes(value).decode("ascii")).encode


@dataclass(frozen=True, eq=False)
class Segmentations:
    """COCO polygons or run-length codes of N boxes, decoded one at a time when asked for.

    Forked processes share the block. A process that receives it pickled maps the same file again if it is mapped.

    Attributes:
        block: (bytes,) uint8, the segmentations in any order: JSON of a code; for polygons how many they are, the
            number of coordinates of each, both as float64, and the coordinates. A code begins with `{`.
        starts, ends: (N,) int64; segmentation i is `block[starts[i]:ends[i]]`, empty if it is missing.
        reach: (N,) float64, see `Form`; infinite for a segmentation that is none, which counts as missing.
        code_hw: (N, 2) int64, see `Form`.
    """

    block: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    reach: NDArray[np.float64]
    code_hw: NDArray[np.int64]

    @staticmethod
    def of(entries: Iterable[Any]) -> "Segmentations":
        """Encode N segmentations; empty ones and None count as missing."""
        writer = SegmentationWriter()
        return writer.finish([writer.add(entry) for entry in entries])

    def __len__(self) -> int:
        """Return N."""
        return len(self.starts)

    def __getitem__(self, row: int) -> Any:
        """Return the polygons or run-length code of a box, `[]` if missing."""
        content = self.block[self.starts[row] : self.ends[row]].tobytes()
        if content[:1] in (b"", b"{"):
            return json.loads(content) if content else []
        numbers = array("d", content[1:]).tolist()
        lengths = [int(length) for length in numbers[1 : 1 + int(numbers[0])]]
        ends = list(itertools.accumulate(lengths, initial=1 + len(lengths)))
        return [numbers[start:end] for start, end in itertools.pairwise(ends)]

    def __reduce__(self) -> tuple[Any, ...]:
        rest = (self.starts, self.ends, self.reach, self.code_hw)
        if isinstance(self.block, np.memmap) and self.block.filename is not None:
            return _map_again, (Path(self.block.filename), self.block.offset, len(self.block), rest)
        return Segmentations, (self.block, *rest)

    @property
    def is_missing(self) -> NDArray[np.bool_]:
        """True (N,) for boxes without segmentation."""
        return self.starts == self.ends

    def select(self, rows: NDArray[np.int64]) -> "Segmentations":
        """Return the segmentations of rows (M,), in this order, over the same block."""
        return Segmentations(self.block, self.starts[rows], self.ends[rows], self.reach[rows], self.code_hw[rows])

    def without(self, is_bad: NDArray[np.bool_]) -> "Segmentations":
        """Return the segmentations, of which the bad ones (N,) are missing."""
        ends = np.where(is_bad, self.starts, self.ends)
        return Segmentations(self.block, self.starts, ends, self.reach, self.code_hw)


class SegmentationWriter:
    """Gather the block piece by piece, so that decoded segmentations never pile up."""

    def __init__(self) -> None:
        self._block = bytearray()
        self._starts, self._ends = array("q", [0]), array("q", [0])  # number 0 is a missing one
        self._reach, self._code_hw = array("d", [0.0]), array("q", [0, 0])

    def add(self, segmentation: Any) -> int:
        """Append a segmentation as far as it can be drawn, see `form_of`, and return its number; 0 if empty."""
        if not segmentation:
            return 0
        self._starts.append(len(self._block))
        try:
            form = form_of(segmentation)
            self._block += _encode(form.content).encode() if isinstance(form.content, dict) else _packed(form.content)
        except DataError:  # told when its image is known
            form = Form(None, math.inf, (0, 0))
        self._ends.append(len(self._block))
        self._reach.append(form.reach)
        self._code_hw.extend(form.code_hw)
        return len(self._starts) - 1

    def finish(self, numbers: Iterable[int]) -> Segmentations:
        """Return the segmentations of these numbers, one per box."""
        columns = (np.array(self._starts), np.array(self._ends), np.array(self._reach))
        whole = Segmentations(
            np.frombuffer(self._block, dtype=np.uint8), *columns, np.array(self._code_hw).reshape(-1, 2)
        )
        return whole.select(np.fromiter(numbers, dtype=np.int64))


def _packed(polygons: list[list[float]]) -> bytes:
    """Return polygons as bytes, see `Segmentations.block`."""
    numbers = array("d", [len(polygons), *map(len, polygons)])
    for polygon in polygons:
        numbers.extend(polygon)
    return b"P" + numbers.tobytes()


def _map_again(file: Path, offset: int, length: int, rest: tuple[Any, ...]) -> Segmentations:
    return Segmentations(np.memmap(file, np.uint8, "r", offset, (length,)), *rest)
