"""YOLO as written by ultralytics and Roboflow: a `data.yaml`, `images/` and, beside them, `labels/`."""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from yaml.reader import ReaderError

from aligndet_cli.data.boxes import BoxRow, box_table
from aligndet_cli.data.dataset import Category
from aligndet_cli.data.findings import Findings, counted
from aligndet_cli.data.format import DataFormat, Labels
from aligndet_cli.data.images import is_image_file, read_size_hw
from aligndet_cli.data.listing import list_images
from aligndet_cli.data.text import decode_text, read_lines
from aligndet_cli.errors import DataError

SPLITS = ("train", "val", "test")
_NAMES_LIKE = "a list of words, e.g. names: [cat, 'traffic: light']"
_KEYS: dict[str, tuple[tuple[type, ...], str]] = {  # allowed types, and their names in messages
    "path": ((str,), "a folder"),
    **dict.fromkeys(SPLITS, ((str, list), "a folder, an image or a .txt file, or a list of these")),
    "names": ((list, dict), _NAMES_LIKE),
    "nc": ((str,), "a number"),
}
_NOTHING = ("", "~", "null", "Null", "NULL")
_MAX_CHARACTERS = 2**20  # of the file, and of a key with its aliases written out; LVIS with 1,203 classes has 30,000
_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class YoloConfig:
    """Content of a data.yaml: the image folders or lists of each split, and the classes."""

    file: Path
    splits: dict[str, list[Path]]
    categories: tuple[Category, ...]


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
        sizes_hw = np.zeros((len(files), 2), dtype=np.int32)
        rows: list[BoxRow] = []
        unreadable = []
        for index, file in enumerate(files):
            label_file = _label_file(file)
            content = label_file.read_bytes() if label_file.is_file() else b""
            digest.update(f"{label_file.name}\0{len(content)}\n".encode() + content)
            try:
                sizes_hw[index] = read_size_hw(file)
            except DataError:
                unreadable += [file] if file.exists() else []
                continue
            rows += _read_labels(content, label_file, index, sizes_hw[index], config, findings)
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
        file = next((file for file in files if _describes_data(file)), None)
    if file is None:
        return {}
    config = read_yolo_config(file)
    return {name: YoloSplit(root, name, config) for name in config.splits}


YOLO = DataFormat("yolo", "data.yaml (YOLO)", find_yolo_splits)


def read_yolo_config(file: Path) -> YoloConfig:
    """Read the folders and classes of a data.yaml.

    Raises:
        DataError: not readable, or without classes or splits.
    """
    values = _read_keys(file)
    base = _base(file, values.get("path"))
    splits = {name: _places(base, values[name]) for name in SPLITS if values.get(name)}
    if not splits:
        raise DataError(f"{file}: names no 'train' or 'val' images; add e.g. 'train: images/train'")
    return YoloConfig(file, splits, _categories(values, file))


def _describes_data(file: Path) -> bool:
    try:
        values = _read_keys(file)
    except DataError:
        return file.stem == "data"
    has_classes, has_splits = "names" in values or "nc" in values, any(values.get(split) for split in SPLITS)
    # A data.yaml with one of both is meant as a data set: reading it reports what is missing.
    return has_classes or has_splits if file.stem == "data" else has_classes and has_splits


def _read_keys(file: Path) -> dict[str, Any]:
    """Return the keys of `_KEYS` in a file: text, a list of texts, or a dict of texts; None for an empty value.

    Scalars stay as they are written, since `no` and `007` are class names here.

    Raises:
        DataError: cannot be read, is not YAML, or a key holds something else.
    """
    content = _parse(file)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds no keys; expected YAML with 'train', 'val' and 'names'")
    values = {key: content[key] if content[key] not in _NOTHING else None for key in _KEYS if key in content}
    for key, value in values.items():
        if value is None:
            continue
        kinds, expected = _KEYS[key]
        words = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not isinstance(value, kinds) or not all(isinstance(word, str) for word in words):
            raise DataError(f"{file}: '{key}' must be {expected}")
        if sum(map(len, words)) > _MAX_CHARACTERS:
            raise DataError(f"{file}: '{key}' is too large when its aliases are written out; write it shorter")
    return values


def _parse(file: Path) -> Any:
    """Read a YAML file; repeated aliases are one object, so the result is no larger than the file."""
    try:
        with file.open(encoding="utf-8-sig") as handle:
            text = handle.read(_MAX_CHARACTERS + 1)
        if len(text) > _MAX_CHARACTERS:
            raise DataError(f"{file}: too large for a data.yaml; list images in a .txt file and name that")
        return yaml.load(text, yaml.BaseLoader)
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a text file; expected YAML with 'train', 'val' and 'names'") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DataError(f"{file}:{line}: not YAML (a control character); remove it") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{file}:{line}: not YAML ({error.problem}); correct that line") from None
    except (RecursionError, ValueError, OverflowError):  # a thousand brackets, or the escape of no character
        raise DataError(f"{file}: cannot be read as YAML; expected 'train', 'val' and 'names'") from None


def _base(file: Path, path: str | None) -> Path:
    """Return the folder that split paths are relative to: `path` as seen from the yaml's folder, else that folder."""
    if path is None:
        return file.parent
    candidate = file.parent / path
    # A `path` that leads nowhere often starts at ultralytics' datasets folder: then the yaml lies in the data set.
    return candidate if candidate.is_dir() else file.parent


def _places(base: Path, value: str | list[str]) -> list[Path]:
    places = []
    for name in value if isinstance(value, list) else [value]:
        place = base / name
        if not place.exists() and name.startswith("../"):
            place = base / name[3:]  # Roboflow writes '../train/images' for 'train/images'
        places.append(place)
    return places


def _categories(values: dict[str, Any], file: Path) -> tuple[Category, ...]:
    names, count = values.get("names"), _whole_number(values.get("nc") or "")
    if count is not None and count > _MAX_CLASSES:
        raise DataError(f"{file}: 'nc' is {count}, more than {_MAX_CLASSES:,} classes; correct it")
    if names is None and count is not None:
        names = [f"class {number}" for number in range(count)]
    by_number = _numbered(names or [])
    if not by_number or min(by_number) < 0:
        raise DataError(f"{file}: 'names' must be {_NAMES_LIKE}")
    if count is not None and count != len(by_number):
        raise DataError(f"{file}: 'nc' is {count} but 'names' lists {len(by_number)} classes; correct one")
    return tuple(Category(number, _whole_characters(name)) for number, name in sorted(by_number.items()))


def _numbered(names: list[str] | dict[str, str]) -> dict[int, str]:
    """Return names by class number; a key that is no number becomes -1."""
    if isinstance(names, list):
        return dict(enumerate(names))
    numbers = ((_whole_number(key), name) for key, name in names.items())
    return {-1 if number is None else number: name for number, name in numbers}


def _whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[-+]?\d{1,18}", text) else None


def _whole_characters(text: str) -> str:
    """Join the two halves of a character that JSON writes as two escapes, which YAML takes for two characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _image_files(config: YoloConfig, split: str, findings: Findings) -> list[Path]:
    """Return the images of all folders, lists and single files of a split."""
    files: list[Path] = []
    for place in config.splits[split]:
        if place.is_dir():
            files += [place / name for name in list_images(place, findings)]
        elif place.suffix == ".txt" and place.is_file():
            lines = read_lines(place, errors="surrogateescape")  # file names may be any bytes
            files += [Path(os.path.normpath(place.parent / line)) for line in lines]
        elif is_image_file(place.name) and place.is_file():
            files.append(place)
        else:
            raise DataError(f"{config.file}: '{split}' names {place}, which is not there; correct 'path' or '{split}'")
    return list(dict.fromkeys(files))


def _label_file(image_file: Path) -> Path:
    """Return `.../labels/a/b.txt` for `.../images/a/b.jpg` (the last `images`), else the file beside the image."""
    parts = list(image_file.parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


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
            category_id, points = _parse_line(words)
        except ValueError as error:
            findings.error("bad-label-lines", f"{where}: {error}; repair or remove the line", example=where)
            continue
        if category_id not in class_ids:
            message = f"{where}: class {category_id} is not among the {len(class_ids)} classes of {config.file.name}"
            findings.error("unknown-category-ids", f"{message}; correct the line or 'names'", example=where)
            continue
        absolute = points * size_hw[::-1]  # (P, 2) x, y
        (x1, y1), (x2, y2) = absolute.min(axis=0).tolist(), absolute.max(axis=0).tolist()
        polygons = [absolute.ravel().tolist()] if len(points) > 2 else []
        yield BoxRow(index, (x1, y1, x2, y2), class_ids[category_id], segmentation=polygons)


def _parse_line(words: list[str]) -> tuple[int, NDArray[np.float64]]:
    """Return class index and points (P, 2) x, y in 0..1: the two corners of a box, or the vertices of a polygon.

    Raises:
        ValueError: neither `class cx cy w h` nor `class x1 y1 x2 y2 x3 y3 ...`, or numbers that are not finite.
    """
    category_id, values = float(words[0]), [float(word) for word in words[1:]]
    if not all(math.isfinite(value) for value in (category_id, *values)):
        raise ValueError("a number is NaN or infinite")
    if category_id != int(category_id):
        raise ValueError(f"class {words[0]} is not a whole number")
    if len(values) == 4:
        cx, cy, width, height = values
        if width <= 0 or height <= 0:  # min and max of the corners would hide a negative size
            width = height = 0.0
        values = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
    elif len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(words)} numbers, expected 'class cx cy w h' or 'class x1 y1 x2 y2 x3 y3 ...'")
    return int(category_id), np.array(values).reshape(-1, 2)
