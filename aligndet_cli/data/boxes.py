"""Labelled boxes of a split as one table, the form into which every format is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.segmentations import Segmentations

# Arrays of a `BoxTable`.
COLUMNS = ("image_index", "boxes", "class_ids", "areas", "is_crowd", "is_ignored", "extents", "ids")


@dataclass
class BoxTable:
    """Boxes of all images in the order of the labels, one form for all formats. N = boxes.

    Attributes:
        image_index: (N,) int64, position of the box's image in the file names.
        boxes: (N, 4) float64, xyxy, absolute pixels, unchecked.
        class_ids: (N,) int64.
        areas: (N,) float64, square pixels; NaN where the labels have none.
        is_crowd: (N,) bool.
        is_ignored: (N,) bool, boxes that are not to be trained on.
        extents: (N, 2) float64, width and height as the labels say them, which corners lose by rounding.
        ids: (N,) int64, unique and not 0.
        segmentations: N entries; None when not asked for.
    """

    image_index: NDArray[np.int64]
    boxes: NDArray[np.float64]
    class_ids: NDArray[np.int64]
    areas: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]
    is_ignored: NDArray[np.bool_]
    extents: NDArray[np.float64]
    ids: NDArray[np.int64]
    segmentations: Segmentations | None = None


class BoxRow(NamedTuple):
    """One box as in `BoxTable`, of a format without areas of its own."""

    image_index: int
    box: tuple[float, float, float, float]
    class_id: int
    is_crowd: bool = False
    segmentation: Any = None


def box_table(rows: Sequence[BoxRow], *, with_masks: bool = False) -> BoxTable:
    """Return N boxes as a table; `with_masks` keeps their segmentations."""
    boxes = np.array([row.box for row in rows], dtype=np.float64).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):  # boxes that are not finite are reported later
        extents = boxes[:, 2:] - boxes[:, :2]
    return BoxTable(
        image_index=np.array([row.image_index for row in rows], dtype=np.int64),
        boxes=boxes,
        class_ids=np.array([row.class_id for row in rows], dtype=np.int64),
        areas=np.full(len(rows), np.nan),
        is_crowd=np.array([row.is_crowd for row in rows], dtype=np.bool_),
        is_ignored=np.zeros(len(rows), dtype=np.bool_),
        extents=extents,
        ids=np.arange(1, len(rows) + 1),
        segmentations=Segmentations.of(row.segmentation for row in rows) if with_masks else None,
    )


def is_area(areas: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return True (N,) for areas that pycocotools' largest range, 0 to 1e10, holds."""
    return np.asarray((areas >= 0) & (areas <= 1e10))  # not NaN either


def select_rows(table: BoxTable, rows: NDArray[np.int64]) -> BoxTable:
    """Return a copy of the table with only these rows (N,), in this order."""
    columns = {name: getattr(table, name)[rows] for name in COLUMNS}
    return BoxTable(**columns, segmentations=table.segmentations and table.segmentations.select(rows))
