"""YOLO without a `data.yaml`: the classes are the lines of `classes.txt` (Label Studio, labelImg) or `obj.names`."""

import itertools
import os
from pathlib import Path

from aligndet_cli.data.dataset import Category
from aligndet_cli.data.format import ALL, DataFormat
from aligndet_cli.data.images import is_image_file
from aligndet_cli.data.listing import has_image_of, has_images_itself, subfolders
from aligndet_cli.data.splits import split_folders, split_meaning
from aligndet_cli.data.text import decode_text, read_label_bytes, read_lines
from aligndet_cli.data.yolo import YoloSplit, holds_labels, label_file_of
from aligndet_cli.data.yolo_yaml import YoloConfig
from aligndet_cli.errors import DataError

_CLASS_LISTS = ("classes.txt", "obj.names")
_MOST_LOOKED_AT = 100


def find_loose_yolo_splits(root: Path) -> dict[str, YoloSplit]:
    """Return the splits by lists of images, else by folders, else `all`; nothing without one list of classes.

    Raises:
        DataError: the list of classes cannot be read, or has a blank line between the names.
    """
    if not root.is_dir():
        return {}
    lists = class_lists(root)
    places = _image_places(root) if lists else {}
    if not places or len({tuple(_class_names(file)) for file in lists}) != 1:
        return {}
    categories = tuple(Category(number, name) for number, name in enumerate(_class_names(lists[0])))
    config = YoloConfig(lists[0], places, categories)
    return {name: YoloSplit(root, name, config) for name in config.splits}


LOOSE_YOLO = DataFormat("yolo", "classes.txt with images/ and labels/ (YOLO)", find_loose_yolo_splits)


def class_lists(root: Path) -> list[Path]:
    """Return the lists of classes of a folder, and of the subfolders in which tools write them."""
    folders = [root, *(root / name for name in ("labels", "images", "data")), *split_folders(root)]
    return [file for folder in folders for name in _CLASS_LISTS if (file := folder / name).is_file()]


def _class_names(file: Path) -> list[str]:
    """Return one name per line.

    Raises:
        DataError: not a text, no name in it, or a blank line between names, since lines are counted.
    """
    names = [line.strip() for line in decode_text(read_label_bytes(file), file).rstrip().splitlines()]
    if not all(names) or not names:
        line = names.index("") + 1 if names else 1
        raise DataError(f"{file}:{line}: blank line; class numbers count the lines, so write a name or remove it")
    return names


def _image_places(root: Path) -> dict[str, list[Path]]:
    """Return the images of each split, or their folder; nothing if no labels belong to them."""
    lists = [file for folder in (root, root / "data") for file in sorted(folder.glob("*.txt")) if _is_list(file)]
    if lists:
        listed = {file.stem: _listed_images(file, root) for file in lists}
        looked_at = [image for images in listed.values() for image in images[:_MOST_LOOKED_AT]]
        is_labelled = any(holds_labels(label_file_of(image)) for image in looked_at)
        return listed if is_labelled and all(listed.values()) else {}
    splits = {folder.name: folder for folder in split_folders(root)}
    candidates = (
        _split_of_images(root / "images"),
        {name: folder / "images" if (folder / "images").is_dir() else folder for name, folder in splits.items()},
        {ALL: root},
    )
    labelled = ({name: [place] for name, place in places.items() if _has_labels(place)} for places in candidates)
    return next(filter(None, labelled), {})


def _is_list(file: Path) -> bool:
    """Return True if a text file is named after a split, and is not the labels of an image of that name."""
    return split_meaning(file.stem) is not None and not has_image_of(file)


def _listed_images(file: Path, root: Path) -> list[Path]:
    """Return the images in a list: paths as seen from the list, from the root, or from above a root called `data`."""
    lines = read_lines(file, errors="surrogateescape")
    for base, start in ((file.parent, ""), (root, ""), (root, "data/")):
        images = [Path(os.path.normpath(base / line.removeprefix(start))) for line in lines]
        if images and is_image_file(images[0].name) and images[0].is_file():
            return images
    return []


def _split_of_images(images: Path) -> dict[str, Path]:
    """Return the subfolders of a folder of images by split, or the whole folder if it has others, too."""
    if not images.is_dir():
        return {}
    folders = split_folders(images)
    is_divided = folders and folders == subfolders(images) and not has_images_itself(images)
    return {folder.name: folder for folder in folders} if is_divided else {ALL: images}


def _has_labels(folder: Path) -> bool:
    """Return True if one of the first text files that may be labels is one, and has an image of its name."""
    label_folder = label_file_of(folder / "x.jpg").parent
    for file in itertools.islice(label_folder.rglob("*.txt"), _MOST_LOOKED_AT):
        if has_image_of(folder / file.relative_to(label_folder)) and holds_labels(file):
            return True
    return False
