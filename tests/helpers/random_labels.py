"""Small data sets with every kind of label, drawn from a seed, in the layouts of COCO, VOC and YOLO."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

KINDS = ("coco", "voc", "yolo")
NAMES = ("cat", "dog", "polar bear", "犬")
STEMS = ("a", "b c", "sub/c", "été", "sub/deep.er/f", "g")  # the last image has no boxes


def draw_labels(kind: str, root: Path, seed: int) -> None:
    """Write images of several sizes and their labels."""
    rng = np.random.default_rng(seed)
    sizes = {f"{stem}.png": tuple(rng.integers(12, 40, 2).tolist()) for stem in STEMS}
    folder = root / {"coco": "train", "voc": "JPEGImages", "yolo": "images"}[kind]
    for number, (name, (height, width)) in enumerate(sizes.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), (number, seed % 256, 7)).save(folder / name)
    {"coco": _write_coco, "voc": _write_voc, "yolo": _write_yolo}[kind](root, sizes, rng)


def coco_labels(sizes: dict[str, tuple[int, int]], rng: np.random.Generator) -> dict[str, Any]:
    """Return COCO labels: ids with gaps in any order, crowds, polygons, run-length codes, boxes without a mask."""
    ids = rng.permutation(np.cumsum(rng.integers(1, 2**40, len(sizes)))).tolist()
    images = [
        {"id": image_id, "file_name": name, "height": height, "width": width}
        for image_id, (name, (height, width)) in zip(ids, sizes.items(), strict=True)
    ]
    category_ids = rng.permutation(np.cumsum(rng.integers(1, 50, len(NAMES)))).tolist()
    annotations = []
    for image in images:
        for _ in range(_count(image["file_name"], rng)):
            size_hw = image["height"], image["width"]
            x1, y1, x2, y2 = _box(size_hw, rng)
            is_crowd = bool(rng.random() < 0.2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice(category_ids)),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(rng.uniform(1, 100)),
                    "iscrowd": int(is_crowd),
                    "segmentation": _segmentation((x1, y1, x2, y2), size_hw, is_crowd, rng),
                }
            )
    rng.shuffle(annotations)
    categories = [{"id": number, "name": name} for number, name in zip(category_ids, NAMES, strict=True)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _count(name: str, rng: np.random.Generator) -> int:
    return 0 if name == f"{STEMS[-1]}.png" else int(rng.integers(0, 5))


def _box(size_hw: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Return xyxy with an area inside the image, of float32 numbers or of two decimals."""
    height, width = size_hw
    x1, y1 = rng.uniform(0, width - 6), rng.uniform(0, height - 6)
    x2, y2 = rng.uniform(x1 + 2, width - 1), rng.uniform(y1 + 2, height - 1)
    box = np.array([x1, y1, x2, y2])
    box = box.astype(np.float32).astype(np.float64) if rng.random() < 0.5 else box.round(2)
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, x2, y2


def _segmentation(
    box: tuple[float, float, float, float], size_hw: tuple[int, int], is_crowd: bool, rng: np.random.Generator
) -> Any:
    x1, y1, x2, y2 = box
    kind = rng.integers(2 if is_crowd else 5)
    mask = np.zeros(size_hw, dtype=np.uint8, order="F")
    mask[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] = rng.random() < 0.9
    if kind == 0:
        code = coco_mask.encode(mask)
        return {"size": list(size_hw), "counts": code["counts"].decode()}
    if kind == 1:
        flat = mask.ravel(order="F")
        changes = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *changes, flat.size]).tolist()
        return {"size": list(size_hw), "counts": [0, *runs] if flat[0] else runs}
    if kind == 2:
        return []
    triangle = [x1, y1, x2, y1, x2, y2]
    return [triangle] if kind == 3 else [triangle, [x1, y1, x2, y2, x1, y2]]


def _write_coco(root: Path, sizes: dict[str, tuple[int, int]], rng: np.random.Generator) -> None:
    file = root / "annotations" / "instances_train.json"
    file.parent.mkdir()
    file.write_text(json.dumps(coco_labels(sizes, rng)), encoding="utf-8")


def _write_voc(root: Path, sizes: dict[str, tuple[int, int]], rng: np.random.Generator) -> None:
    for name, (height, width) in sizes.items():
        objects = []
        for _ in range(_count(name, rng)):
            ends = zip(("xmin", "ymin", "xmax", "ymax"), _box((height, width), rng), strict=True)
            box = "".join(f"<{key}>{value + 1}</{key}>" for key, value in ends)
            difficult = int(rng.random() < 0.3)
            words = f"<name>{rng.choice(NAMES)}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox>"
            objects.append(f"<object>{words}</object>")
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        file = root / "Annotations" / name.replace(".png", ".xml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<annotation>{size}{''.join(objects)}</annotation>", encoding="utf-8")


def _write_yolo(root: Path, sizes: dict[str, tuple[int, int]], rng: np.random.Generator) -> None:
    for name, (height, width) in sizes.items():
        lines = []
        for _ in range(_count(name, rng)):
            x1, y1, x2, y2 = (np.array(_box((height, width), rng)) / [width, height, width, height]).tolist()
            box = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
            numbers = box if rng.random() < 0.5 else [x1, y1, x2, y1, x2, y2]
            lines.append(" ".join(map(str, [int(rng.integers(len(NAMES))), *numbers])))
        file = root / "labels" / name.replace(".png", ".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"train: images\nnames: {json.dumps(NAMES)}\n", encoding="utf-8")
