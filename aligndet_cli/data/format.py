"""Interface of the data formats: finding the splits of a folder, and reading one as `Labels`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.boxes import BoxTable
from aligndet_cli.data.dataset import Category
from aligndet_cli.data.findings import Findings

ALL = "all"  # name of the only split of a data set that is not divided


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
