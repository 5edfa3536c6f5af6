"""Label files that lie in a folder and that no layout takes: what they look like, and the way to use them."""

import os
from collections.abc import Iterator
from pathlib import Path

from aligndet_cli.data.coco_layouts import first_images
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.images import is_image_file
from aligndet_cli.data.layouts import find_loose_splits
from aligndet_cli.data.yolo_layouts import class_lists
from aligndet_cli.errors import DataError

_MOST_NAMED = 3
_MOST_FILES = 100_000  # that are looked at


def require_boxes(image_set: ImageSet, reason: str) -> None:
    """Make sure that images have labels with boxes to train on.

    Args:
        reason: why labels are needed, where no stray ones explain it.

    Raises:
        DataError: they have none, or no box that can be trained on.
    """
    if not image_set.has_labels:
        advice = describe_stray_labels(image_set.root) or reason
        raise DataError(f"{image_set.root}: no labels for split '{image_set.split}'; {advice}")
    if lack := image_set.lack_of_boxes():
        raise DataError(lack)


def describe_stray_labels(root: Path) -> str:
    """Return one sentence about label files below a folder, with the way out; "" if there are none."""
    files = list(_files(root))
    return (
        _describe_choice(root)
        or _describe_coco(root, files)
        or _describe_xml(files)
        or _describe_texts(root, files)
        or _describe_others(files)
    )


def _describe_choice(root: Path) -> str:
    try:
        kinds = list(find_loose_splits(root, "auto"))
    except DataError as error:
        return str(error)
    return (
        f"labels of {' and '.join(kinds)} lie there: choose with --format {'|'.join(kinds)}" if len(kinds) > 1 else ""
    )


def _describe_coco(root: Path, files: list[Path]) -> str:
    found = {file: names for file in files if file.suffix == ".json" and (names := first_images(file))}
    if not found:
        return ""
    first = next(iter(found))
    if len(found) > 1:
        some = ", ".join(map(str, list(found)[:_MOST_NAMED])) + (", ..." if len(found) > _MOST_NAMED else "")
        return f"{some} look like COCO labels: choose with --annotations FILE --images DIR"
    folders = _folders_holding(found[first], files)
    likely = [folder for folder in (root / first.stem, first.parent / "images", root / "images") if folder.is_dir()]
    choice = " or ".join(map(str, folders[:_MOST_NAMED] or likely[:1] or [root]))
    return f"{first} looks like COCO labels: use --annotations {first} --images {choice}"


def _folders_holding(names: list[str], files: list[Path]) -> list[Path]:
    """Return the folders as seen from which one of the names is among the files."""
    found = (
        Path(file.as_posix().removesuffix(f"/{name}"))
        for file in files
        for name in names
        if file.as_posix().endswith(f"/{name}")
    )
    return list(dict.fromkeys(found))


def _describe_xml(files: list[Path]) -> str:
    xml = [file for file in files if file.suffix == ".xml"]
    if not xml:
        return ""
    if xml[0].name == "annotations.xml":
        return f"{xml[0]} looks like labels of CVAT for images: export them as COCO or Pascal VOC"
    place = "beside the images" if xml[0].with_suffix("") in _images_among(files) else f"in {xml[0].parent}"
    return f"{len(xml)} .xml files lie {place}: move them to Annotations/ and the images to JPEGImages/ (VOC)"


def _describe_others(files: list[Path]) -> str:
    """Return a sentence about .json files that are named like images: labelme, Supervisely."""
    images = _images_among(files)
    others = [file for file in files if file.suffix == ".json" and {file.with_suffix(""), *_named(file)} & images]
    if not others:
        return ""
    return f"{len(others)} .json files have the names of images, first {others[0]}: export these labels as COCO"


def _named(file: Path) -> list[Path]:
    """Return the image that `a.jpg.json` names, without suffix."""
    inner = file.with_suffix("")
    return [inner.with_suffix("")] if is_image_file(inner.name) else []


def _describe_texts(root: Path, files: list[Path]) -> str:
    images, texts = _images_among(files), [file for file in files if file.suffix == ".txt"]
    txt = [f for f in texts if "labels" in f.relative_to(root).parts[:-1] or f.with_suffix("") in images]
    if not txt:
        return ""
    lists = class_lists(root)
    if len(lists) > 1:
        advice = f"{lists[0]} and {lists[1]} list other classes: write"
    else:
        advice = f"write {root / 'classes.txt'} with one class per line, or"
    return (
        f"{len(txt)} .txt files look like YOLO labels, first {txt[0]}: {advice} a {root / 'data.yaml'} with "
        "'train: FOLDER' and 'names: [...]'"
    )


def _images_among(files: list[Path]) -> set[Path]:
    """Return the paths of images without suffix."""
    return {file.with_suffix("") for file in files if is_image_file(file.name)}


def _files(root: Path) -> Iterator[Path]:
    left = _MOST_FILES
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names)[:left]:
            yield Path(parent, name)
        left -= len(names)
        if left <= 0:
            return
