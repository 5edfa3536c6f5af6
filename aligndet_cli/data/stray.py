"""Label files that lie in a folder and that no layout takes: what they look like, and the way to use them."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from aligndet_cli.data.images import is_image_file

_MOST_FILES = 100_000  # that are looked at


def describe_stray_labels(root: Path) -> str:
    """Return one sentence about label files below a folder, with the way out; "" if there are none."""
    files = list(_files(root))
    images = {file.with_suffix("") for file in files if is_image_file(file.name)}
    coco = next((file for file in files if file.suffix == ".json" and _looks_like_coco(file)), None)
    if coco is not None:
        folders = (root / coco.stem, coco.parent / "images", root / "images", root)
        folder = next(folder for folder in folders if folder.is_dir())
        return f"{coco} looks like COCO labels: use --annotations {coco} --images {folder}"
    xml = [file for file in files if file.suffix == ".xml"]
    if xml:
        place = "beside the images" if xml[0].with_suffix("") in images else f"in {xml[0].parent}"
        return f"{len(xml)} .xml files lie {place}: move them to Annotations/ and the images to JPEGImages/ (VOC)"
    texts = (file for file in files if file.suffix == ".txt")
    txt = [f for f in texts if "labels" in f.relative_to(root).parts[:-1] or f.with_suffix("") in images]
    if txt:
        return (
            f"{len(txt)} .txt files look like YOLO labels, first {txt[0]}: write a {root / 'data.yaml'} with "
            "'train: FOLDER' and 'names: [...]'"
        )
    return ""


def _files(root: Path) -> Iterator[Path]:
    left = _MOST_FILES
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names)[:left]:
            yield Path(parent, name)
        left -= len(names)
        if left <= 0:
            return


def _looks_like_coco(file: Path) -> bool:
    try:
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b'"annotations"') >= 0 and content.find(b'"images"') >= 0
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False
