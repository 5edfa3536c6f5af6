"""YOLO as written by ultralytics and Roboflow: a `data.yaml`, `images/` and, beside them, `labels/`."""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.boxes import BoxRow, box_table
from aligndet_cli.data.findings import Findings, counted
from aligndet_cli.data.format import DataFormat, Labels
from aligndet_cli.data.images import is_image_file, read_size_hw
from aligndet_cli.data.listing import is_file, is_folder, is_there, list_images
from aligndet_cli.data.text import decode_text, read_lines
from aligndet_cli.data.yolo_yaml import YoloConfig, describes_data, read_yolo_config
from aligndet_cli.errors import DataError


@dataclass(frozen=True)
class YoloSplit:
    """One split of a data.yaml; `root` may be the yaml itself."""

    root: Path
    name: str
    config: YoloConfig

    def read(self, findings: Findings, *, with_masks: bool, index_dir: Path | None) -> Labels:
        """See `SplitSource`. Polygons become their bounding box, and segmentations when asked for.

        Boxes are relative to the image size, so the header of every image is read. An image whose header cannot be
        read keeps its place without boxes; the code that decodes it later reports it.
        """
        config = self.config
        files = _image_files(config, self.name, findings)
        images_dir = Path(os.path.commonpath([file.parent for file in files])) if files else config.file.parent
        files = sorted(files, key=lambda file: file.relative_to(images_dir).as_posix())
        digest = hashlib.sha256(repr(config.categories).encode())
        if config.num_keypoint_values:
            digest.update(f"{config.num_keypoint_values} values of key points\n".encode())
        sizes_hw = np.zeros((len(files), 2), dtype=np.int32)
        rows: list[BoxRow] = []
        unreadable = []
        for index, file in enumerate(files):
            label_file = label_file_of(file)
            content = label_file.read_bytes() if is_file(label_file) else b""
            digest.update(f"{label_file.name}\0{len(content)}\n".encode("utf-8", "surrogatepass") + content)
            try:
                sizes_hw[index] = read_size_hw(file)
            except DataError:
                unreadable += [file] if is_file(file) else []
                continue
            rows += _read_labels(content, label_file, index, sizes_hw[index], config, findings)
        _report_unmatched(files, findings)
        if config.num_keypoint_values and rows:
            message = f"key points of {counted(len(rows), 'box', 'boxes')} are left out; the boxes are used"
            findings.info("key-points", message, count=len(rows), example=str(config.file))
        if unreadable:
            what = counted(len(unreadable), "image cannot be read and has", "images cannot be read and have")
            message = f"{what} no boxes, first {unreadable[0]}"
            findings.warn("unreadable-headers", message, count=len(unreadable), example=str(unreadable[0]))
        return Labels(
            format="yolo",
            root=self.root,
            split=self.name,
            images_dir=images_dir,
            file_names=[file.relative_to(images_dir).as_posix() for file in files],
            image_ids=np.arange(len(files), dtype=np.int64),
            sizes_hw=sizes_hw,
            table=box_table(rows, with_masks=with_masks),
            categories=config.categories,
            label_digest=digest.hexdigest(),
        )

    def describe_absence(self) -> str:
        """Return one line if nothing is there of what the yaml names for this split, else ""."""
        places = self.config.splits[self.name]
        return "" if any(is_there(place) for place in places) else _not_there(self.config, self.name, places[0])


def find_yolo_splits(root: Path) -> dict[str, YoloSplit]:
    """Return the splits that the yaml of a data set names.

    The yaml is the root itself, `data.yaml`, or another one with classes and splits.

    Raises:
        DataError: the yaml is not readable, or lacks classes or splits.
    """
    if root.is_file():
        file = root if root.suffix in (".yaml", ".yml") else None
    else:
        files = sorted([*root.glob("*.yaml"), *root.glob("*.yml")], key=lambda file: (file.stem != "data", file.name))
        file = next((file for file in files if describes_data(file)), None)
    if file is None:
        return {}
    config = read_yolo_config(file)
    return {name: YoloSplit(root, name, config) for name in config.splits}


YOLO = DataFormat("yolo", "data.yaml (YOLO)", find_yolo_splits)


def _image_files(config: YoloConfig, split: str, findings: Findings) -> list[Path]:
    """Return the images of all folders, lists and single files of a split."""
    files: list[Path] = []
    for place in config.splits[split]:
        if is_folder(place):
            files += [place / name for name in list_images(place, findings)]
        elif place.suffix == ".txt" and is_file(place):
            lines = read_lines(place, errors="surrogateescape")  # file names may be any bytes
            files += [_tidy(place.parent / line) for line in lines]
        elif is_image_file(place.name) and is_file(place):
            files.append(place)
        else:
            raise DataError(_not_there(config, split, place))
    if len({file.is_absolute() for file in files}) > 1:
        files = [file.absolute() for file in files]
    return list(dict.fromkeys(files))


def _tidy(path: Path) -> Path:
    """Return a path without `..`, and with one `/` at its beginning, where POSIX allows two."""
    text = os.path.normpath(path)
    return Path("/" + text.lstrip("/") if text.startswith("//") else text)


def _not_there(config: YoloConfig, split: str, place: Path) -> str:
    return f"{config.file}: '{split}' names {place}, which is not there; correct 'path' or '{split}'"


def label_file_of(image_file: Path) -> Path:
    """Return `.../labels/a/b.txt` for `.../images/a/b.jpg` (the last `images`) if that folder is there.

    Else the labels lie beside the image.
    """
    parts = list(image_file.parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    file = Path(*parts).with_suffix(".txt")
    return file if is_folder(file.parent) else image_file.with_suffix(".txt")


def _report_unmatched(image_files: list[Path], findings: Findings) -> None:
    """Report label files of no image if there are images without labels, which are trained on as negatives."""
    labels = {file: label_file_of(file) for file in image_files}
    without = [file for file, label in labels.items() if not is_file(label)]
    if not without:
        return
    folders = {label.parent for label in labels.values() if label.parent.name != "" and "labels" in label.parts}
    present = {file for folder in folders for file in folder.glob("[!.]*") if file.suffix.lower() == ".txt"}
    unmatched = sorted(present - set(labels.values()))
    if unmatched:
        pairs = f"{counted(len(unmatched), 'label file')} of no image, first {unmatched[0]}, and "
        images = counted(len(without), "image without labels", "images without labels")
        message = f"{pairs}{images}, first {without[0]}; their names must be equal, accents and capitals too"
        findings.warn("unmatched-labels", message, count=len(unmatched), example=str(unmatched[0]))


def holds_labels(file: Path) -> bool:
    """Return True if the first line of a file is a box or polygon."""
    try:
        lines = read_lines(file)
        return bool(lines) and _parse_line(lines[0].split(), 0)[0] >= 0
    except (DataError, OSError, ValueError):
        return False


def _read_labels(
    content: bytes,
    file: Path,
    index: int,
    size_hw: NDArray[np.int32],
    config: YoloConfig,
    findings: Findings,
) -> Iterator[BoxRow]:
    """Yield the boxes of the label file of an image."""
    class_ids = {category.category_id: class_id for class_id, category in enumerate(config.categories)}
    for number, line in enumerate(decode_text(content, file, errors="replace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{file}:{number}"
        try:
            category_id, points = _parse_line(words, config.num_keypoint_values)
        except ValueError as error:
            findings.error("bad-label-lines", f"{where}: {error}; repair or remove the line", example=where)
            continue
        if category_id not in class_ids:
            message = f"{where}: class {category_id} is not among the {len(class_ids)} classes of {config.file.name}"
            findings.error("unknown-category-ids", f"{message}; correct the line or that list", example=where)
            continue
        absolute = points * size_hw[::-1]  # (P, 2) x, y
        (x1, y1), (x2, y2) = absolute.min(axis=0).tolist(), absolute.max(axis=0).tolist()
        polygons = [absolute.ravel().tolist()] if len(points) > 2 else []
        yield BoxRow(index, (x1, y1, x2, y2), class_ids[category_id], segmentation=polygons)


def _parse_line(words: list[str], num_keypoint_values: int) -> tuple[int, NDArray[np.float64]]:
    """Return class index and points (P, 2) x, y in 0..1: the two corners of a box, or the vertices of a polygon.

    Raises:
        ValueError: neither `class cx cy w h` nor `class x1 y1 x2 y2 x3 y3 ...`, or not `class cx cy w h` and as many
            values of key points as the yaml says, or numbers that are not finite.
    """
    category_id, values = float(words[0]), [float(word) for word in words[1:]]
    if not all(math.isfinite(value) for value in (category_id, *values)):
        raise ValueError("a number is NaN or infinite")
    if category_id != int(category_id):
        raise ValueError(f"class {words[0]} is not a whole number")
    if num_keypoint_values:
        if len(values) != 4 + num_keypoint_values:
            said = f"'class cx cy w h' and {num_keypoint_values} for key points, as 'kpt_shape' says"
            raise ValueError(f"{len(words)} numbers, expected {said}")
        values = values[:4]
    if len(values) == 4:
        far = next((value for value in values if not -1 < value < 2), None)
        if far is not None:
            raise ValueError(f"{far:g} is no part of an image, which are 0 to 1: are these pixels?")
        cx, cy, width, height = values
        if width <= 0 or height <= 0:  # min and max of the corners would hide a negative size
            width = height = 0.0
        values = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
    else:
        _check_polygon(values)
    return int(category_id), np.array(values).reshape(-1, 2)


def _check_polygon(values: list[float]) -> None:
    """Make sure that numbers can be x1 y1 x2 y2 x3 y3 ... of a polygon, relative to the image size.

    Raises:
        ValueError: too few or an odd number of them, or a point more than an image away; both are seen in key points.
    """
    advice = "a box with key points needs 'kpt_shape: [points, 2 or 3]' in the yaml"
    if len(values) < 6 or len(values) % 2:
        hint = f"; {advice}" if len(values) > 6 and len(values) % 3 == 1 else ""
        expected = "'class cx cy w h' or 'class x1 y1 x2 y2 x3 y3 ...'"
        raise ValueError(f"{len(values) + 1} numbers, expected {expected}{hint}")
    far = next((value for value in values if not -1 < value < 2), None)
    if far is not None:
        raise ValueError(f"{far:g} is no coordinate of a polygon, which are 0..1; {advice}")
