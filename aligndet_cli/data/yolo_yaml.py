"""The `data.yaml` of a YOLO data set: its folders, its classes and the shape of its key points."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from aligndet_cli.data.dataset import Category
from aligndet_cli.data.listing import is_folder, is_there
from aligndet_cli.data.splits import meaning_of
from aligndet_cli.data.text import decode_text
from aligndet_cli.errors import DataError

SPLITS = ("train", "val", "test")
_NAMES_LIKE = "a list of words, e.g. names: [cat, 'traffic: light']"
_KEYS: dict[str, tuple[tuple[type, ...], str]] = {  # allowed types, and their names in messages
    "path": ((str,), "a folder"),
    **dict.fromkeys(SPLITS, ((str, list), "a folder, an image or a .txt file, or a list of these")),
    "names": ((list, dict), _NAMES_LIKE),
    "nc": ((str,), "a number"),
    "kpt_shape": ((list,), "the number of key points and the numbers of each, e.g. [17, 3]"),
}
_NOTHING = ("", "~", "null", "Null", "NULL")
_MAX_CHARACTERS = 2**20  # of the file, and of a key with its aliases written out; LVIS with 1,203 classes has 30,000
_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class YoloConfig:
    """Content of a data.yaml, or of a list of classes.

    Attributes:
        splits: the image folders, lists or files of each split.
        num_keypoint_values: numbers that follow the box in each line of the labels, for key points; 0 if boxes or
            polygons are labelled.
    """

    file: Path
    splits: dict[str, list[Path]]
    categories: tuple[Category, ...]
    num_keypoint_values: int = 0


def read_yolo_config(file: Path) -> YoloConfig:
    """Read the folders and classes of a data.yaml.

    Raises:
        DataError: not readable, or without classes or splits.
    """
    values = _read_keys(file)
    splits = _places(file, values)
    if not splits:
        raise DataError(f"{file}: names no 'train' or 'val' images; add e.g. 'train: images/train'")
    return YoloConfig(file, splits, _categories(values, file), _num_keypoint_values(values, file))


def describes_data(file: Path) -> bool:
    """Return True if a yaml names classes and splits, or is a data.yaml."""
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
    content = _with_plain_keys(content, file)
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


def _with_plain_keys(content: dict[Any, Any], file: Path) -> dict[Any, Any]:
    """Return the keys of a yaml with `train`, `val` and `test` for their other spellings, such as `Train` and `valid`.

    Raises:
        DataError: two keys mean the same split.
    """
    plain: dict[Any, Any] = {}
    for key, value in content.items():
        meaning = meaning_of(key) if isinstance(key, str) else None
        name = meaning if meaning in SPLITS else key
        if name in plain:
            raise DataError(f"{file}: names the images of '{name}' twice (as '{key}', too); remove one of the keys")
        plain[name] = value
    return plain


def _parse(file: Path) -> Any:
    """Read a YAML file; repeated aliases are one object, so the result is no larger than the file."""
    try:
        with file.open("rb") as handle:
            content = handle.read(_MAX_CHARACTERS + 1)
        if len(content) > _MAX_CHARACTERS:
            raise DataError(f"{file}: too large for a data.yaml; list images in a .txt file and name that")
        text = decode_text(content, file)
        return yaml.load(text, yaml.BaseLoader)
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
    return candidate if is_folder(candidate) else file.parent


def _places(file: Path, values: dict[str, Any]) -> dict[str, list[Path]]:
    """Return the folders, lists and images that a yaml names, by split.

    Roboflow writes '../train/images' for 'train/images'; one reading holds for all places of the yaml.

    Raises:
        DataError: something is there in both readings.
    """
    base = _base(file, values.get("path"))
    named = {split: values[split] for split in SPLITS if values.get(split)}
    named = {split: value if isinstance(value, list) else [value] for split, value in named.items()}
    upward = [name for names in named.values() for name in names if name.startswith("../")]
    outside = [base / name for name in upward if is_there(base / name)]
    inside = [base / name[3:] for name in upward if is_there(base / name[3:])]
    if outside and inside:
        raise DataError(
            f"{file}: '../' may mean {inside[0]} or {os.path.normpath(outside[0])}; write the paths without '../', or "
            "rename one of the folders"
        )
    start = 0 if outside else len("../")
    return {
        split: [base / (name[start:] if name.startswith("../") else name) for name in names]
        for split, names in named.items()
    }


def _num_keypoint_values(values: dict[str, Any], file: Path) -> int:
    """Return the product of `kpt_shape`; 0 if there is none.

    Raises:
        DataError: not a number of points and 2 or 3.
    """
    shape = values.get("kpt_shape")
    if shape is None:
        return 0
    numbers = [_whole_number(word) or 0 for word in shape]
    if len(numbers) != 2 or numbers[0] < 1 or numbers[1] not in (2, 3):
        raise DataError(f"{file}: 'kpt_shape' must be {_KEYS['kpt_shape'][1]} (of each 2 or 3)")
    return numbers[0] * numbers[1]


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
