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


MIN_COORDINATES = 6  # three corners; pycocotools takes four numbers for a box


def usable_polygons(polygons: list[Any]) -> list[Any]:
    """Return the polygons that have three corners or more; a flat list of numbers is one polygon.

    Entries that are no lists stay: the code that draws them says that they are no polygons.
    """
    if isinstance(polygons[0], int | float):
        polygons = [polygons]
    return [
        polygon
        for polygon in polygons
        if not isinstance(polygon, list) or (len(polygon) >= MIN_COORDINATES and len(polygon) % 2 == 0)
    ]


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
    """Gather the text piece by piece, so that decoded segmentations never pile up.

    Attributes:
        num_unusable: segmentations so far that hold no polygon of three corners; they count as missing.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self.num_unusable = 0

    def add(self, segmentation: Any) -> tuple[int, int]:
        """Append a segmentation in the form of `usable_polygons` and return its start and end."""
        start = len(self._text)
        if segmentation and isinstance(segmentation, list):
            segmentation = usable_polygons(segmentation)
            self.num_unusable += not segmentation
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
