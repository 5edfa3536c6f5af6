"""Masks of boxes as one block of text, which is far smaller than nested lists and can be mapped from a file."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Run-length codes made by pycocotools hold bytes.
_encode = json.JSONEncoder(separators=(",", ":"), default=lambda value: bytes(value).decode("ascii")).encode


@dataclass(frozen=True, eq=False)
class Segmentations:
    """COCO polygons or run-length codes of N boxes, decoded one at a time when asked for.

    Forked processes share the text. A process that receives it pickled maps the same file again if the text is mapped.

    Attributes:
        text: (bytes,) uint8, JSON of the segmentations in any order.
        starts, ends: (N,) int64; segmentation i is `text[starts[i]:ends[i]]`, empty if it is missing.
    """

    text: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

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
        text = self.text[self.starts[row] : self.ends[row]].tobytes()
        return json.loads(text) if text else []

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.text, np.memmap) and self.text.filename is not None:
            place = (Path(self.text.filename), self.text.offset, len(self.text))
            return _map_again, (place, self.starts, self.ends)
        return Segmentations, (self.text, self.starts, self.ends)

    @property
    def is_missing(self) -> NDArray[np.bool_]:
        """True (N,) for boxes without segmentation."""
        return self.starts == self.ends

    def select(self, rows: NDArray[np.int64]) -> "Segmentations":
        """Return the segmentations of rows (M,), in this order, over the same text."""
        return Segmentations(self.text, self.starts[rows], self.ends[rows])


class SegmentationWriter:
    """Gather the text piece by piece, so that decoded segmentations never pile up."""

    def __init__(self) -> None:
        self._text = bytearray()

    def add(self, segmentation: Any) -> tuple[int, int]:
        """Append a segmentation and return its start and end."""
        start = len(self._text)
        if segmentation:
            self._text += _encode(segmentation).encode()
        return start, len(self._text)

    def finish(self, places: Iterable[tuple[int, int]]) -> Segmentations:
        """Return the segmentations at these places, one per box."""
        bounds = np.array(list(places), dtype=np.int64).reshape(-1, 2)
        text = np.frombuffer(self._text, dtype=np.uint8)
        return Segmentations(text, np.ascontiguousarray(bounds[:, 0]), np.ascontiguousarray(bounds[:, 1]))


def _map_again(place: tuple[Path, int, int], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Segmentations:
    file, offset, length = place
    return Segmentations(np.memmap(file, np.uint8, "r", offset, (length,)), starts, ends)
