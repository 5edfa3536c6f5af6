"""A plain folder of images, with all its subfolders; no labels."""

import os
from pathlib import Path

import numpy as np

from aligndet_cli.data.assembly import Labels, box_table
from aligndet_cli.data.images import is_image_file
from aligndet_cli.errors import DataError


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
