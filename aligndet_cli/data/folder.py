"""A folder of images and its subfolders, without labels; the subfolders may be classes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.boxes import box_table
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.format import ALL, Labels
from aligndet_cli.data.listing import distinct_subfolders, has_images, list_images, nothing_found
from aligndet_cli.errors import DataError


@dataclass(frozen=True)
class FolderClasses:
    """Classes of images that lie in one folder per class, like ImageNet.

    Attributes:
        names: the folders, sorted; position = class id.
        class_ids: (B,) int64, one per image.
    """

    names: tuple[str, ...]
    class_ids: NDArray[np.int64]


def folder_classes(file_names: Sequence[str]) -> FolderClasses | None:
    """Return the classes in relative file names `CLASS/.../x.jpg`; None if a name has none, or all have one class."""
    folders = [name.split("/", 1)[0] if "/" in name else "" for name in file_names]
    names = tuple(sorted(set(folders)))
    if len(names) < 2 or names[0] == "":
        return None
    number_of = {name: number for number, name in enumerate(names)}
    return FolderClasses(names, np.array([number_of[folder] for folder in folders], dtype=np.int64))


def class_tree_splits(root: Path) -> tuple[str, str] | None:
    """Return the training and validation folder of a tree of `train/CLASS/x.jpg` and `val/CLASS/x.jpg`, else None."""
    for validation in ("val", "test"):
        if all(_has_class_folders(root / split) for split in ("train", validation)):
            return "train", validation
    return None


def _has_class_folders(folder: Path) -> bool:
    children = distinct_subfolders(folder)
    return len(children) > 1 and all(has_images(child) for child in children)


@dataclass(frozen=True)
class FolderSplit:
    """A folder of images without labels, directly in it or in subfolders."""

    root: Path
    name: str
    images_dir: Path

    def read(self, findings: Findings, *, with_masks: bool, index_dir: Path | None) -> Labels:
        """See `SplitSource`. Images are sorted by relative name."""
        if not self.images_dir.is_dir():
            raise DataError(f"{self.images_dir}: no such folder; check the path")
        file_names = list_images(self.images_dir, findings)
        if not file_names:
            raise DataError(nothing_found(self.images_dir, expected=".jpg, .png, .bmp, .webp or .tif files"))
        return Labels(
            format="folder",
            root=self.root,
            split=self.name,
            images_dir=self.images_dir,
            file_names=file_names,
            image_ids=np.arange(len(file_names), dtype=np.int64),
            sizes_hw=np.zeros((len(file_names), 2), dtype=np.int32),
            table=box_table([]),
            categories=(),
            label_digest="none",
        )


def choose_folder(root: Path, split: str | None) -> FolderSplit:
    """Return the whole folder for the split `all` or None, else the subfolder of that name.

    Raises:
        DataError: there is no such subfolder.
    """
    found = FolderSplit(root, ALL, root) if split in (None, ALL) else find_subfolder(root, str(split))
    if found is None:
        raise DataError(f"{root}: a plain folder has no split '{split}'; leave --split out or name a subfolder")
    return found


def find_subfolder(root: Path, split: str) -> FolderSplit | None:
    """Return a direct subfolder as a split of that name, None if there is none."""
    is_plain_name = re.fullmatch(r"[\w-][\w.-]*", split)
    return FolderSplit(root, split, root / split) if is_plain_name and (root / split).is_dir() else None
