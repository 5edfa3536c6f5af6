"""Small data sets on disk in the layouts that `tests/data/` reads."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def make_image(path: Path, size_hw: tuple[int, int] = (40, 60), color: tuple[int, int, int] = (9, 99, 199)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size_hw[::-1], color).save(path)


def coco_content() -> dict[str, Any]:
    """Return three images of 40x60: with a box and a crowd, without boxes, and with a box at the border."""
    return {
        "images": [
            {"id": image_id, "file_name": name, "height": 40, "width": 60}
            for image_id, name in ((30, "c.jpg"), (10, "a.jpg"), (20, "b.jpg"))
        ],
        "annotations": [
            {"id": 1, "image_id": 20, "category_id": 9, "bbox": [50, 30, 10, 10], "area": 77, "iscrowd": 0},
            {"id": 2, "image_id": 30, "category_id": 4, "bbox": [1, 2, 3, 4], "area": 11.5, "iscrowd": 0},
            {"id": 3, "image_id": 30, "category_id": 9, "bbox": [5, 5, 20, 10], "iscrowd": 1},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
    }


def make_coco(root: Path, content: Any = None, split: str = "train2017") -> Path:
    """Write the json and an image (of its own colour) for every safe file name; return the path of the json."""
    content = coco_content() if content is None else content
    for number, image in enumerate(content["images"]):
        name = image.get("file_name", "") if isinstance(image, dict) else ""
        if isinstance(name, str) and name and ".." not in name and not name.startswith("/"):
            make_image(root / split / name, color=(number, len(split), 7))
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def voc_xml(
    *objects: tuple[str, tuple[float, ...]], difficult: int = 0, size_hw: tuple[int, int] | None = (40, 60)
) -> str:
    parts = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2) in objects
    ]
    size = f"<size><width>{size_hw[1]}</width><height>{size_hw[0]}</height><depth>3</depth></size>" if size_hw else ""
    return f"<annotation><filename>ignored.png</filename>{size}{''.join(parts)}</annotation>"


def make_voc(year: Path, labels: dict[str, str], splits: dict[str, list[str]]) -> None:
    """Write a VOC year; `labels` maps image stem to XML text."""
    (year / "Annotations").mkdir(parents=True)
    (year / "ImageSets" / "Main").mkdir(parents=True)
    for stem, text in labels.items():
        make_image(year / "JPEGImages" / f"{stem}.jpg")
        file = year / "Annotations" / f"{stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for split, stems in splits.items():
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")


def make_yolo(root: Path, labels: dict[str, str | None], yaml: str = "") -> None:
    """Write a YOLO set; `labels` maps `train/a` to the text of its label file, None for no file; images are 40x60."""
    for name, text in labels.items():
        make_image(root / "images" / f"{name}.jpg")
        if text is not None:
            file = root / "labels" / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    default = "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
    (root / "data.yaml").write_text(yaml or default)
