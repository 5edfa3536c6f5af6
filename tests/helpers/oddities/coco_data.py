"""COCO: the clean data set, its twins, and ways of changing one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.oddities.oddity import (
    AS_MEANT,
    NAMES,
    SIZE_HW,
    THINGS,
    Change,
    write_pictures,
)

Content = dict[str, Any]

MISSING = object()
LISTS = {"image": "images", "annotation": "annotations", "category": "categories"}
HEIGHT, WIDTH = SIZE_HW
NAN, INF, HUGE = math.nan, math.inf, 10**400  # the last is no float

LEFT_OUT = "not trained on; evaluation counts it as pycocotools does"
CLIPPED = "clipped for training; evaluation takes it as it is, as pycocotools does"
TINY = "a box of less than a pixel"
CROWD = "the box is a crowd"
NO_MASK = "the box has no mask"
TWICE = "the box is there twice"
COPY = "the image is there twice"


def write_coco(root: Path) -> None:
    """Write the clean data set."""
    write_pictures(lambda split: root / split)
    image_id = 7
    for split, pictures in THINGS.items():
        content: Content = {"info": {"year": 2026}, "licenses": [], "images": [], "annotations": [], "categories": []}
        for name, things in pictures.items():
            content["images"].append({"id": image_id, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
            for thing in things:
                x1, y1, x2, y2 = thing.box
                number = len(content["annotations"]) + 1
                corners = [[x1, y1, x2, y1, x2, y2, x1, y2]]
                about = {"id": number, "image_id": image_id, "category_id": NAMES.index(thing.name) + 1}
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                is_crowd = int(thing.is_crowd)
                content["annotations"].append({**about, **box, "segmentation": corners, "iscrowd": is_crowd})
            image_id += 1
        content["categories"] = [
            {"id": number, "name": name, "supercategory": "animal"} for number, name in enumerate(NAMES, start=1)
        ]
        _file(root, split).parent.mkdir(exist_ok=True)
        _file(root, split).write_text(json.dumps(content, indent=1))


def _file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


# Twins of training alone: pycocotools reads the label file otherwise, and evaluation does as it does.
OF_TRAINING = (LEFT_OUT, CLIPPED)


# ---- ways of changing ----


def editing(edit: Callable[[Content], Any], splits: tuple[str, ...] = tuple(THINGS)) -> Change:
    """Return a change of the content of the label files, in place; a value that is returned takes its place."""

    def change(root: Path) -> None:
        for split in splits:
            content = json.loads(_file(root, split).read_text())
            content = edit(content) or content
            _file(root, split).write_text(json.dumps(content))

    return change


def rewriting(edit: Callable[[str], bytes]) -> Change:
    """Return a change of the text of the label files."""

    def change(root: Path) -> None:
        for split in THINGS:
            _file(root, split).write_bytes(edit(_file(root, split).read_text()))

    return change


def setting(kind: str, key: str, value: Any) -> Change:
    """Return a change of one value of the first image, annotation or category."""

    def edit(content: Content) -> None:
        entry = content[LISTS[kind]][0]
        if value is MISSING:
            del entry[key]
        else:
            entry[key] = value

    return editing(edit)


def renumbering(kind: str, number: int, position: int = 0) -> Change:
    """Return a change of the id of an image or a category, and of all that refer to it."""

    def edit(content: Content) -> None:
        entry = content[LISTS[kind]][position]
        for annotation in content["annotations"]:
            if annotation[f"{kind}_id"] == entry["id"]:
                annotation[f"{kind}_id"] = number
        entry["id"] = number

    return editing(edit)


def moving(name: str, place: str | None = None) -> Change:
    """Return a change of the name of the first image; its file goes to `place` (default: where the name says)."""

    def change(root: Path) -> None:
        for split, pictures in THINGS.items():
            file = root / split / f"{next(iter(pictures))}.jpg"
            target = root / split / (place or name)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
        setting("image", "file_name", name)(root)

    return change


def copying_first_image(root: Path) -> None:
    """Add the first image once more under another name, with its boxes."""
    for split, pictures in THINGS.items():
        content = (root / split / f"{next(iter(pictures))}.jpg").read_bytes()
        (root / split / "copy.jpg").write_bytes(content)
    editing(lambda content: add_image(content, "copy.jpg"))(root)


def add_image(content: Content, name: str) -> None:
    """List an image of that name after all others, with the boxes of the first."""
    first = content["images"][0]
    content["images"].append({**first, "id": 99, "file_name": name})
    own = [entry for entry in content["annotations"] if entry["image_id"] == first["id"]]
    content["annotations"] += [{**entry, "id": 100 + entry["id"], "image_id": 99} for entry in own]


def first_annotation(content: Content) -> Content:
    found: Content = content["annotations"][0]
    return found


def add(entries: list[Any], entry: Any) -> None:
    entries.append(entry)


def for_all(key: str, value: Callable[[Any], Any]) -> Change:
    """Return a change of a value of every annotation."""

    def edit(content: Content) -> None:
        for entry in content["annotations"]:
            entry[key] = value(entry[key])

    return editing(edit)


def in_all_images(key: str, value: Any) -> Change:
    def edit(content: Content) -> None:
        for image in content["images"]:
            image[key] = value

    return editing(edit)


def relative(box: list[float]) -> list[float]:
    return [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]


def retyped(key: str, kind: type) -> Change:
    return editing(lambda content: content[key][0].update(id=kind(content[key][0]["id"])))


def with_text_ids(content: Content) -> None:
    for image in content["images"]:
        image["id"] = str(image["id"])
    for entry in content["annotations"]:
        entry["image_id"] = str(entry["image_id"])


def without_ids(content: Content) -> None:
    for entry in content["annotations"]:
        del entry["id"]


def with_list(key: str, value: Any) -> Callable[[Content], None]:
    def edit(content: Content) -> None:
        if value is MISSING:
            del content[key]
        else:
            content[key] = value

    return edit


TWINS: dict[str, Change] = {
    AS_MEANT: lambda root: None,
    LEFT_OUT: editing(lambda content: content["annotations"].pop(0) and None, ("train",)),
    CLIPPED: setting("annotation", "bbox", [8, 8, WIDTH - 8, 32]),
    TINY: for_all("bbox", relative),
    CROWD: setting("annotation", "iscrowd", 1),
    NO_MASK: setting("annotation", "segmentation", MISSING),
    TWICE: editing(lambda content: content["annotations"].insert(1, {**first_annotation(content), "id": 99})),
    COPY: copying_first_image,
}
