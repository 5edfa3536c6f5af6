"""COCO labels under names of their own: `annotations/train.json`, `labels.json`, `result.json`, `dataset.json`.

A name says little, so a file counts if it begins like COCO labels and one of its first images is found.
"""

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from aligndet_cli.data.coco import CocoSplit
from aligndet_cli.data.format import ALL, DataFormat
from aligndet_cli.data.listing import is_file, subfolders
from aligndet_cli.data.splits import split_folders, split_meaning

_MOST_FILES = 20  # a folder with more .json files has one per image (labelme), which is not COCO
_MOST_IMAGES = 5
_WINDOW_BYTES = 2**20  # enough for the first entries of a list
_OTHERS = {"segments_info", "score"}  # in panoptic labels, and in proposals and predictions
_LABEL_FOLDERS = {"annotations", "annotation", "labels"}
_IMAGE_FOLDERS = ("", "images", "data", "JPEGImages", "imgs", "img")
_LIST = {key: re.compile(rf'"{key}"\s*:\s*\['.encode()) for key in ("images", "annotations")}
_SEPARATOR = re.compile(r"[\s,]*")


class CocoFile(NamedTuple):
    """A file of COCO labels, the name of the split that its name tells ("" if none), and the folder of its images."""

    file: Path
    split: str
    images: Path


def find_loose_coco_splits(root: Path) -> dict[str, CocoSplit]:
    """Return the splits of files whose names tell them apart, or the only file as a split; else nothing."""
    found = coco_files(root)
    meanings = {split_meaning(entry.split) for entry in found}
    if len(found) > 1 and (None in meanings or len(meanings) < len(found)):
        return {}
    return {entry.split or ALL: CocoSplit(root, entry.split or ALL, entry.file, (entry.images,)) for entry in found}


LOOSE_COCO = DataFormat("coco", "a COCO json beside its images", find_loose_coco_splits)


def coco_files(root: Path) -> list[CocoFile]:
    """Return the COCO labels of a folder, and of its subfolders that are named after labels or splits."""
    found = []
    named = [folder for folder in subfolders(root) if folder.name.lower() in _LABEL_FOLDERS]
    for folder in (root, *named, *split_folders(root)):
        for file in _json_files(folder):
            split = _split_in(file.stem) or (folder.name if split_meaning(folder.name) and folder != root else "")
            names = first_images(file)
            images = _folder_of(names, root, file, split)
            if images is not None:
                found.append(CocoFile(file, split, images))
    return found


def image_folders(root: Path, file: Path, split: str) -> list[list[Path]]:
    """Return the folders that tools use for images: for those of a split of this name, of this meaning, and of any."""
    meaning = split_meaning(split)
    own = [folder for base in (root, root / "images") for folder in split_folders(base)] if meaning else []
    tiers = [
        [folder for folder in own if folder.name == split],
        [folder for folder in own if folder.name != split and split_meaning(folder.name) == meaning],
        [file.parent, root],
    ]
    return [list(dict.fromkeys(folder / name for folder in tier for name in _IMAGE_FOLDERS)) for tier in tiers]


def first_images(file: Path) -> list[str]:
    """Return the names of the first images in COCO labels of boxes, with `/`; nothing if a file is something else.

    Only the beginnings of the lists are read, so that a large file costs little.
    """
    try:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
            images = list(_first_entries(content, "images"))
            if not images or not _has_boxes(content):
                return []
    except (OSError, ValueError):  # an empty file cannot be mapped
        return []
    names = (entry.get("file_name") for entry in images if isinstance(entry, dict))
    return [name.replace("\\", "/") for name in names if isinstance(name, str)]


def _has_boxes(content: mmap.mmap) -> bool:
    """Return True if there are categories and labelled boxes: not captions, panoptic segments or boxes with scores."""
    start = _LIST["annotations"].search(content)
    if not start or (content.find(b'"categories"', 0, start.start()) < 0 and content.rfind(b'"categories"') < 0):
        return False
    entry = next(_first_entries(content, "annotations"), None)
    return entry is None or (isinstance(entry, dict) and "bbox" in entry and not _OTHERS & entry.keys())


def _first_entries(content: mmap.mmap, key: str) -> Iterator[object]:
    """Yield the first entries of a list, as far as they are within a window after its beginning."""
    start = _LIST[key].search(content)
    text = content[start.end() : start.end() + _WINDOW_BYTES].decode("utf-8", "replace") if start else ""
    decoder, place = json.JSONDecoder(), 0
    for _ in range(_MOST_IMAGES):
        separator = _SEPARATOR.match(text, place)
        try:
            entry, place = decoder.raw_decode(text, separator.end() if separator else place)
        except (ValueError, RecursionError):
            return
        yield entry


def _json_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))
    return files if len(files) <= _MOST_FILES else []


def _split_in(stem: str) -> str:
    """Return the only word in a file name that means a split, as it is written; "" if there is none, or several."""
    words = [word for word in re.split(r"[^A-Za-z0-9]+", stem) if split_meaning(word)]
    return words[0] if len(words) == 1 else ""


def _folder_of(names: list[str], root: Path, file: Path, split: str) -> Path | None:
    """Return the folder that holds one of these images, None if there is none, or if there are several."""
    safe = [name for name in names if not name.startswith("/") and ".." not in PurePosixPath(name).parts]
    for folders in image_folders(root, file, split):
        holding = [folder for folder in folders if any(is_file(folder / name) for name in safe)]
        if holding:
            return holding[0] if len(holding) == 1 else None
    return None
