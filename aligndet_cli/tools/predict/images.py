"""Images and videos named by the words of a command line. Free of torch."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.images import is_image_file
from aligndet_cli.data.listing import list_images, report_unreadable_kinds, without_readable_twins
from aligndet_cli.errors import DataError
from aligndet_cli.logs import logger
from aligndet_cli.tools.predict.videos import VIDEO_SUFFIXES


class Inputs(NamedTuple):
    """Images and videos to detect in.

    Attributes:
        images: with ids 1, 2 and so on; there may be none.
        videos: names as those of the images, relative to `images.images_dir`.
    """

    images: ImageSet
    videos: tuple[str, ...]


def find_inputs(words: Sequence[str], leave_out: Sequence[Path]) -> Inputs:
    """Return all images and videos that the words name, each once, in the order of the words.

    File names are relative to the innermost folder that holds all of them.

    Args:
        words: files, folders with all below them, and glob patterns (`**` for any folders).
        leave_out: folders to ignore: earlier calls may have written pictures into them.

    Raises:
        DataError: a word names no image and no video.
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
    names = [Path(path).relative_to(folder).as_posix() for path in paths]
    videos = tuple(name for name in names if _is_video(Path(name)))
    return Inputs(_image_set(folder, [name for name in names if name not in set(videos)]), videos)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _matches(word: str, findings: Findings) -> list[Path]:
    if not word:  # a variable of the shell that is not set; Path("") would be the current folder
        return []
    path = Path(word)
    if path.is_dir():
        return _inside(path, findings)
    if path.exists():
        return [path]  # any name is fine: reading tells if it is an image
    found = [Path(name) for name in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207  # absolute patterns too
    folders = {match for match in found if match.is_dir()}
    below = [file for folder in folders if "**" not in word for file in _inside(folder, findings)]
    report_unreadable_kinds(map(Path, without_readable_twins(map(str, found))), findings)
    is_wanted = [match not in folders and (is_image_file(match.name) or _is_video(match)) for match in found]
    return sorted([match for match, wanted in zip(found, is_wanted, strict=True) if wanted] + below)


def _inside(folder: Path, findings: Findings) -> list[Path]:
    """Return the images below a folder, then the videos."""
    images = [folder / name for name in list_images(folder, findings)]
    videos = sorted(path for path in folder.rglob("*") if _is_video(path) and path.is_file())
    return images + [path for path in videos if not _is_hidden(path.relative_to(folder))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
