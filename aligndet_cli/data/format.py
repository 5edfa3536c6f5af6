"""Interface of the data formats: finding the splits of a folder, and reading one as `Labels`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.dataset import Category
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.segmentations import Segmentations

COLUMNS = ("image_index", "boxes", "class_ids", "areas", "is_crowd")  # arrays of a `BoxTable`
ALL = "all"  # name of the only split of a data set that is not divided


@dataclass
class BoxTable:
    """Boxes of all images in any order. N = boxes.

    Attributes:
        image_index: (N,) int64, position of the box's image in `Labels.file_names`.
        boxes: (N, 4) float64, xyxy, absolute pixels, unchecked.
        class_ids: (N,) int64.
        areas: (N,) float64, square pixels; NaN where the format has none.
        is_crowd: (N,) bool.
        segmentations: N entries; None when not asked for.
    """

    image_index: NDArray[np.int64]
    boxes: NDArray[np.float64]
    class_ids: NDArray[np.int64]
    areas: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]
    segmentations: Segmentations | None = None


@dataclass
class LabelContent:
    """Labels of one split as read, before the checks that all formats share; other fields as in `ImageSet`.

    `label_digest` is a hash of the label files.
    """

    file_names: list[str]
    image_ids: NDArray[np.int64]
    sizes_hw: NDArray[np.int32]
    table: BoxTable
    categories: tuple[Category, ...]
    label_digest: str


@dataclass
class Labels(LabelContent):
    """Labels of one split with their place; fields as in `ImageSet`."""

    format: str
    root: Path
    split: str
    images_dir: Path
    annotations: Path | None = None

    @property
    def source(self) -> Path:
        """The file or folder to name in messages."""
        return self.annotations or self.images_dir


class SplitSource(Protocol):
    """One split of a data set, found on disk but not read yet.

    Classes that implement it have the fields `root` (the folder that the user named) and `name` (of the split).
    """

    def read(self, findings: Findings, *, with_masks: bool, index_dir: Path | None) -> Labels:
        """Read images and boxes.

        Args:
            with_masks: also read segmentations, if the format has them.
            index_dir: folder in which large label files are kept parsed, see `data/index.py`.

        Raises:
            DataError: the split cannot be read at all, or (strict findings) an entry is wrong.
        """


@dataclass(frozen=True)
class DataFormat:
    """A format with labels that a folder may have.

    Attributes:
        name: as in `DataConfig.format`.
        layout: files of such a folder, for messages.
        find: returns the splits of a folder by name; empty if the folder has another format.
    """

    name: str
    layout: str
    find: Callable[[Path], Mapping[str, SplitSource]]


class BoxRow(NamedTuple):
    """One box as in `BoxTable`, of a format without areas of its own."""

    image_index: int
    box: tuple[float, float, float, float]
    class_id: int
    is_crowd: bool = False
    segmentation: Any = None


def box_table(rows: Sequence[BoxRow], *, with_masks: bool = False) -> BoxTable:
    """Return N boxes as a table; `with_masks` keeps their segmentations."""
    return BoxTable(
        image_index=np.array([row.image_index for row in rows], dtype=np.int64),
        boxes=np.array([row.box for row in rows], dtype=np.float64).reshape(-1, 4),
        class_ids=np.array([row.class_id for row in rows], dtype=np.int64),
        areas=np.full(len(rows), np.nan),
        is_crowd=np.array([row.is_crowd for row in rows], dtype=np.bool_),
        segmentations=Segmentations.of(row.segmentation for row in rows) if with_masks else None,
    )


def select_rows(table: BoxTable, rows: NDArray[np.int64]) -> BoxTable:
    """Return a copy of the table with only these rows (N,), in this order."""
    columns = {name: getattr(table, name)[rows] for name in COLUMNS}
    return BoxTable(**columns, segmentations=table.segmentations and table.segmentations.select(rows))
