"""Images named by the words of a command line. Free of torch."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.images import is_image_file
from aligndet_cli.data.listing import list_images, report_unreadable_kinds, without_readable_twins
from aligndet_cli.errors import DataError
from aligndet_cli.logs import logger


def find_images(words: Sequence[str], leave_out: Sequence[Path]) -> ImageSet:
    """Return all images that the words name, each once, in the order of the words.

    Ids are 1, 2 and so on. File names are relative to the innermost folder that holds all images.

    Args:
        words: files, folders with all below them, and glob patterns (`**` for any folders).
        leave_out: folders to ignore: earlier calls may have written pictures into them.

    Raises:
        DataError: a word names no image.
    """
    paths: dict[str, None] = {}
    findings = Findings(is_strict=False)
    ignored = [folder.absolute() for folder in leave_out]
    for word in words:
        found = [os.path.abspath(path) for path in _matches(word, findings)]  # noqa: PTH100  # `resolve` would follow links
        kept = [path for path in found if not any(Path(path).is_relative_to(folder) for folder in ignored)]
        if not kept:
            hint = "name files, folders, or a pattern such as 'photos/*.jpg'"
            hint = findings.items[-1].message if findings.items else hint
            raise DataError(f"{word}: no images there; {hint}")
        paths.update(dict.fromkeys(kept))
    for item in findings.items:
        logger.warning(item.message)
    folder = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))  # noqa: PTH120
    return _image_set(folder, [Path(path).relative_to(folder).as_posix() for path in paths])


def _matches(word: str, findings: Findings) -> list[Path]:
    if not word:  # a variable of the shell that is not set; Path("") would be the current folder
        return []
    path = Path(word)
    if path.is_dir():
        return [path / name for name in list_images(path, findings)]
    if path.exists():
        return [path]  # any name is fine: reading tells if it is an image
    found = [Path(name) for name in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207  # absolute patterns too
    folders = {match for match in found if match.is_dir()}
    below = [folder / name for folder in folders if "**" not in word for name in list_images(folder, findings)]
    report_unreadable_kinds(map(Path, without_readable_twins(map(str, found))), findings)
    return sorted([match for match in found if match not in folders and is_image_file(match.name)] + below)


def _image_set(folder: Path, file_names: list[str]) -> ImageSet:
    """Return images without labels."""
    count = len(file_names)
    return ImageSet(
        format="folder",
        root=folder,
        split="",
        images_dir=folder,
        file_names=file_names,
        image_ids=np.arange(1, count + 1, dtype=np.int64),
        sizes_hw=np.zeros((count, 2), dtype=np.int32),
        offsets=np.zeros(count + 1, dtype=np.int64),
        boxes=np.zeros((0, 4), dtype=np.float32),
        class_ids=np.zeros(0, dtype=np.int64),
        areas=np.zeros(0, dtype=np.float32),
        is_crowd=np.zeros(0, dtype=np.bool_),
        segmentations=None,
        categories=(),
        fingerprint="",
        problems={},
    )
