"""Detections as a COCO json, and in the formats of other programs: YOLO's text files, and one table."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pycocotools import mask as coco_mask

from aligndet_cli.data.dataset import Category

LABELS, NAMES, TABLE = "labels", "names.yaml", "detections.csv"
_COLUMNS = ("file", "frame", "class", "score", "x1", "y1", "x2", "y2")


class Results:
    """Images and annotations of a COCO json whose annotations have a `score`, to look at or to label further."""

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = categories
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.num_frames = 0

    def add(self, image: dict[str, Any], size_hw: tuple[int, int], entries: Sequence[dict[str, Any]]) -> None:
        """Add an image, of which all but its size is given, and what was found in it."""
        self.images.append({**image, "height": size_hw[0], "width": size_hw[1]})
        self.num_frames += "frame" in image
        for entry in entries:
            mask = entry.get("segmentation")
            area = float(coco_mask.area(mask)) if mask else round(entry["bbox"][2] * entry["bbox"][3], 3)
            number = len(self.annotations) + 1
            self.annotations.append({"id": number, "image_id": image["id"], **entry, "area": area, "iscrowd": 0})

    def content(self) -> dict[str, Any]:
        """Return the COCO json."""
        classes = [{"id": category.category_id, "name": category.name} for category in self.categories]
        return {"images": self.images, "categories": classes, "annotations": self.annotations}


def label_file(file_name: str) -> str:
    """Return the name of an image's text file: `a/b.jpg` has `a/b.txt`."""
    return str(PurePosixPath(file_name).with_suffix(".txt"))


def write_yolo(content: Mapping[str, Any], folder: Path, *, with_scores: bool) -> None:
    """Write `labels/`, a text file for each image, and `names.yaml`.

    A line is class, centre x, centre y, width and height, as shares of the image, and its score if asked for. Classes
    count from 0 in the order of `names.yaml`. An image in which nothing was found has an empty file.

    Args:
        content: COCO json; annotations have a `score`.
        folder: both are written here.
        with_scores: add the score.
    """
    places = {category["id"]: place for place, category in enumerate(content["categories"])}
    lines: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in content["annotations"]:
        x, y, box_width, box_height = entry["bbox"]
        width, height = sizes[entry["image_id"]]
        shares = ((x + box_width / 2) / width, (y + box_height / 2) / height, box_width / width, box_height / height)
        score = [f"{entry['score']:.6f}"] if with_scores else []
        words = [str(places[entry["category_id"]]), *(f"{share:.6f}" for share in shares), *score]
        lines[entry["image_id"]].append(" ".join(words))
    for image in content["images"]:
        file = folder / LABELS / label_file(image["file_name"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines[image["id"]]), encoding="utf-8")
    names = {places[category["id"]]: category["name"] for category in content["categories"]}
    text = yaml.safe_dump({"names": names}, allow_unicode=True, sort_keys=False)
    (folder / NAMES).write_text(text, encoding="utf-8")


def write_table(content: Mapping[str, Any], file: Path) -> None:
    """Write a CSV file, a row for each detection: boxes are corners in pixels, and images have no frame."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    with file.open("w", encoding="utf-8", newline="") as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(_COLUMNS)
        for entry in content["annotations"]:
            image = images[entry["image_id"]]
            x, y, width, height = entry["bbox"]
            corners = (round(value, 3) for value in (x, y, x + width, y + height))
            place = image.get("video", image["file_name"]), image.get("frame", "")
            table.writerow([*place, names[entry["category_id"]], entry["score"], *corners])
