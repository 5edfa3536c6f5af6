"""A plain folder of images, with all its subfolders; no labels but, where they are sorted by class, the subfolders."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.assembly import Labels, box_table
from aligndet_cli.data.images import is_image_file
from aligndet_cli.errors import DataError


@dataclass(frozen=True)
class FolderClasses:
    """Classes of images that lie in one folder per class, as ImageNet's.

    Attributes:
        names: the folders, sorted; position = class id.
        class_ids: (B,) int64, one per image.
    """

    names: tuple[str, ...]
    class_ids: NDArray[np.int64]


def folder_classes(file_names: Sequence[str]) -> FolderClasses | None:
    """The classes that relative file names `CLASS/.../x.jpg` tell; None if any is without, or all are of one."""
    folders = [name.split("/", 1)[0] if "/" in name else "" for name in file_names]
    names = tuple(sorted(set(folders)))
    if len(names) < 2 or names[0] == "":
        return None
    number_of = {name: number for number, name in enumerate(names)}
    return FolderClasses(names, np.array([number_of[folder] for folder in folders], dtype=np.int64))


def class_tree_splits(root: Path) -> tuple[str, str] | None:
    """Training and validation folder of a tree such as `train/CLASS/x.jpg`, `val/CLASS/x.jpg`; None for any other."""
    for validation in ("val", "test"):
        if all(_has_class_folders(root / split) for split in ("train", validation)):
            return "train", validation
    return None


def _has_class_folders(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    children = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    return len(children) > 1 and all(has_images(child) for child in children)


def read_folder(root: Path, images_dir: Path, split: str) -> Labels:
    """All images below a folder, sorted by relative name.

    Raises:
        DataError: the folder is missing or holds no image.
    """
    if not images_dir.is_dir():
        raise DataError(f"{images_dir}: no such folder; check the path")
    file_names = list_images(images_dir)
    if not file_names:
        raise DataError(f"{images_dir}: no images found in it; expected .jpg, .png, .bmp, .webp or .tif files")
    return Labels(
        format="folder",
        root=root,
        split=split,
        images_dir=images_dir,
        file_names=file_names,
        image_ids=np.arange(len(file_names), dtype=np.int64),
        sizes_hw=np.zeros((len(file_names), 2), dtype=np.int32),
        table=box_table([], [], [], []),
        categories=(),
        label_digest="none",
    )


def list_images(folder: Path) -> list[str]:
    """Relative names (with `/`) of all image files below a folder, sorted; hidden files and folders are left out."""
    found = []
    for parent, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = Path(parent).relative_to(folder)
        found += [(prefix / name).as_posix() for name in files if is_image_file(name)]
    return sorted(found)


def has_images(folder: Path) -> bool:
    """Whether there is any image file below a folder; stops at the first."""
    return any(is_image_file(name) for _, _, files in os.walk(folder) for name in files)
