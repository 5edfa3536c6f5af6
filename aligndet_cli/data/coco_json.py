"""Reading of a COCO json: every field is checked and converted here, once, for all that use labels.

A value of another type than usual is converted where its meaning is certain (`"7"`, `7.0` or `true`), else it is an
error that names file and entry.
"""

import contextlib
import gc
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.boxes import BoxTable, select_rows
from aligndet_cli.data.dataset import Category, positions_of
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.format import LabelContent
from aligndet_cli.data.images import MAX_PIXELS
from aligndet_cli.data.segmentations import SegmentationWriter
from aligndet_cli.data.text import decode_text, parse_json, read_label_bytes
from aligndet_cli.errors import DataError

Entries = list[dict[str, Any]]
_MAX_COORDINATE = 2.0**31  # pixels; boxes of larger numbers have no area in float32
_MAX_NUMBER = 2.0**63
_MAX_ANNOTATION_ID = 2**53  # pycocotools stores ids as floats


def parse_coco(file: Path, *, with_masks: bool, findings: Findings) -> LabelContent:
    """Return the labels of a COCO json. Class ids follow ascending category ids.

    Raises:
        DataError: not such a file; with strict findings, any wrong entry.
    """
    masks = SegmentationWriter() if with_masks else None
    content, digest = _load(file, masks)
    return read_content(content, digest, file, findings, masks)


def read_content(
    content: dict[str, Any], digest: str, file: Path, findings: Findings, masks: SegmentationWriter | None = None
) -> LabelContent:
    """Return the labels of a loaded json; ids of another type are converted in place.

    Args:
        masks: holds the segmentations, of which `content` has the places.

    Raises:
        DataError: with strict findings, any wrong entry.
    """
    with _paused_gc():
        images = _images(content["images"], file, findings)
        kinds: dict[str, type] = {"image_id": int, "category_id": int, "bbox": list}
        annotations = well_formed(content["annotations"], kinds, f"{file}: annotations", findings)
        image_ids = id_array([image["id"] for image in images], file)
        categories = categories_of(content["categories"], file, findings)
        table = _boxes(annotations, image_ids, categories, file, findings)
        if masks is not None:
            table.segmentations = masks.finish(entry.get("segmentation", 0) for entry in annotations)
        is_known = (table.image_index >= 0) & (table.class_ids >= 0)
        return LabelContent(
            file_names=[image["file_name"] for image in images],
            image_ids=image_ids,
            sizes_hw=_sizes_hw(images, file, findings),
            table=table if is_known.all() else select_rows(table, np.flatnonzero(is_known)),
            categories=categories,
            label_digest=digest,
        )


def load_coco(file: Path, *, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> tuple[dict[str, Any], str]:
    """Return the content of a COCO json, unchecked but for its three lists, and the hash of its bytes.

    Raises:
        DataError: cannot be read, not JSON, or without one of the lists.
    """
    raw = read_label_bytes(file)
    digest = hashlib.sha256(raw).hexdigest()
    text = decode_text(raw, file)
    del raw
    with _paused_gc():
        content = parse_json(text, file, object_hook=object_hook)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: no list '{key}' at its top level; expected a COCO instances json")
    return content, digest


def _load(file: Path, masks: SegmentationWriter | None) -> tuple[dict[str, Any], str]:
    """Return what `load_coco` does, without polygons: they are most of the bytes.

    With `masks`, they move there and only their place stays.
    """

    def without_polygons(entry: dict[str, Any]) -> dict[str, Any]:
        segmentation = entry.pop("segmentation", None)
        if masks is not None and segmentation:
            entry["segmentation"] = masks.add(segmentation)
        return entry

    return load_coco(file, object_hook=without_polygons)


def _images(entries: list[Any], file: Path, findings: Findings) -> Entries:
    """Return the images that have an id and a file name, with unique ids."""
    images = well_formed(entries, {"id": int, "file_name": str}, f"{file}: images", findings)
    by_id: dict[int, dict[str, Any]] = {}
    duplicates = []
    for image in images:
        if by_id.setdefault(image["id"], image) is not image:
            duplicates.append(image["id"])
    if duplicates:
        findings.error(
            "duplicate-image-ids",
            f"{file}: image id {duplicates[0]} occurs more than once ({len(duplicates)} duplicates in all); "
            "make the ids unique",
            count=len(duplicates),
            example=f"image id {duplicates[0]}",
        )
        images = list(by_id.values())
    return images


def well_formed(entries: list[Any], kinds: dict[str, type], where: str, findings: Findings) -> Entries:
    """Return the entries that are objects with the wanted keys and types; report the others.

    Whole numbers in another type are converted in place.
    """
    wanted = tuple(kinds.items())
    good = []
    bad = []
    for position, entry in enumerate(entries):
        if type(entry) is not dict:
            bad.append(position)
            continue
        for key, kind in wanted:
            if type(entry.get(key)) is not kind and not (kind is int and _make_whole(entry, key)):
                bad.append(position)
                break
        else:
            good.append(entry)
    if bad:
        entry = entries[bad[0]]
        fields = entry if type(entry) is dict else {}
        key, kind = next((pair for pair in wanted if type(fields.get(pair[0])) is not pair[1]), wanted[0])
        state = f"has {_shown(fields[key])} for" if key in fields else "has no"
        findings.error(
            "malformed-entries",
            f"{where}[{bad[0]}] {state} '{key}', expected {_KIND_NAMES[kind]} ({len(bad)} such entries); "
            "repair or remove it",
            count=len(bad),
            example=f"{where}[{bad[0]}]",
        )
    return good


_KIND_NAMES = {int: "a whole number", str: "a text", list: "[x, y, width, height]"}


def _shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _make_whole(entry: dict[str, Any], key: str) -> bool:
    """Replace a whole number in another type (`7.0`, `"7"`) by an int; return False for anything else."""
    value = entry.get(key)
    number = _number(value)
    if number is None or not number.is_integer() or isinstance(value, bool):
        return False
    # `int` of a text is exact beyond 2**53, where a float is not.
    entry[key] = int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else int(number)
    return True


def _number(value: Any) -> float | None:
    """Return a number, also as a text says it; NaN for None and NaN (not told), None for anything else."""
    if value is None:
        return math.nan
    try:
        number = float(value) if isinstance(value, int | float | str) else math.inf
    except (ValueError, OverflowError):
        return None
    return None if abs(number) > _MAX_NUMBER else number


def _sizes_hw(images: Entries, file: Path, findings: Findings) -> NDArray[np.int32]:
    """Return (B, 2) heights and widths, zeros where the json lacks one; report what is no size of an image."""
    sizes = [(_side(image.get("height")), _side(image.get("width"))) for image in images]
    bad = [index for index, (height, width) in enumerate(sizes) if height is None or width is None]
    bad = bad or [index for index, (height, width) in enumerate(sizes) if (height or 0) * (width or 0) > MAX_PIXELS]
    if bad:
        image = images[bad[0]]
        height, width = (_shown(image.get(key)) for key in ("height", "width"))
        findings.error(
            "malformed-sizes",
            f"{file}: images[{bad[0]}] has height {height} and width {width}, expected whole numbers of pixels "
            f"({len(bad)} such images); correct or remove them",
            count=len(bad),
            example=image["file_name"],
        )
    for index in bad:
        sizes[index] = (0, 0)
    known = [size if all(size) else (0, 0) for size in sizes]
    return np.array(known, dtype=np.int32).reshape(-1, 2)


def _side(value: Any) -> int | None:
    """Return a side in pixels, as a whole number in whatever type it is written; 0 if unknown, None for no size."""
    if value is None or value == "":
        return 0
    side = _number(value)
    is_side = side is not None and side.is_integer() and 0 <= side < 2**31 and not isinstance(value, bool)
    return int(side) if side is not None and is_side else None


def categories_of(entries: list[Any], file: Path, findings: Findings) -> tuple[Category, ...]:
    """Return categories by ascending id; report entries without id and equal ids."""
    good = well_formed(entries, {"id": int}, f"{file}: categories", findings)
    found = {entry["id"]: Category(entry["id"], _name_of(entry)) for entry in good}
    if len(found) < len(good):
        findings.error("duplicate-category-ids", f"{file}: categories have equal ids; make them unique")
    return tuple(found[category_id] for category_id in sorted(found))


def _name_of(category: dict[str, Any]) -> str:
    """Return the name of a category; its id if it has none."""
    name = category.get("name")
    return str(category["id"] if name is None else name)


def _boxes(
    annotations: Entries,
    image_ids: NDArray[np.int64],
    categories: tuple[Category, ...],
    file: Path,
    findings: Findings,
) -> BoxTable:
    """Return all annotations as arrays; `image_index` or `class_ids` is -1 for an unknown id."""
    category_ids = id_array([category.category_id for category in categories], file)
    boxes = box_array([entry["bbox"] for entry in annotations], file, findings)  # (N, 4) xywh
    corners = boxes.copy()
    corners[:, 2:] += corners[:, :2]
    return BoxTable(
        image_index=_positions(annotations, "image", image_ids, file, findings),
        boxes=corners,
        class_ids=_positions(annotations, "category", category_ids, file, findings),
        areas=number_column(annotations, "area", file, findings),
        is_crowd=_flags(annotations, "iscrowd", file, findings),
        is_ignored=_flags(annotations, "ignore", file, findings),
        extents=boxes[:, 2:],
        ids=_annotation_ids(annotations, file, findings),
    )


def _positions(
    annotations: Entries, what: str, known: NDArray[np.int64], file: Path, findings: Findings
) -> NDArray[np.int64]:
    """Return the positions (N,) of the ids of images or categories among the known ones, -1 for an unknown id."""
    column = id_array([entry[f"{what}_id"] for entry in annotations], file)
    positions = positions_of(column, known)
    unknown = np.flatnonzero(positions < 0)
    if len(unknown):
        value = int(column[unknown[0]])
        findings.error(
            f"unknown-{what}-ids",
            f"{file}: annotations[{unknown[0]}] has {what} id {value}, which is not listed "
            f"({len(unknown)} such annotations); add the {what} or remove them",
            count=len(unknown),
            example=f"{what} id {value}",
        )
    return positions


def _types_in(rows: list[Any]) -> set[type]:
    """Return the types of the values of all rows; `true` and `false` would pass for numbers."""
    return set(map(type, itertools.chain.from_iterable(rows)))


def id_array(ids: list[int], file: Path) -> NDArray[np.int64]:
    """Return ids as an array (N,) int64.

    Raises:
        DataError: an id of more than 64 bits.
    """
    try:
        return np.array(ids, dtype=np.int64)
    except OverflowError:
        huge = _shown(max(ids, key=abs))
        raise DataError(f"{file}: an id does not fit into 64 bits ({huge}); renumber it") from None


def _annotation_ids(annotations: Entries, file: Path, findings: Findings) -> NDArray[np.int64]:
    """Return the ids (N,) of annotations, or 1..N if pycocotools would be misled by their own.

    It stores the id of a matched ground truth as a float and reads 0 as "not matched", so a box with id 0 (common in
    converted data), a text or a number of more than 53 bits can never be found; and of two boxes with equal ids it sees
    the second twice.
    """
    ids = [entry.get("id") for entry in annotations]
    if all(type(number) is int and 0 < abs(number) < _MAX_ANNOTATION_ID for number in ids) and len(set(ids)) == len(
        ids
    ):
        return np.array(ids, dtype=np.int64)
    message = f"{file}: annotations are numbered anew, since their ids are not unique whole numbers from 1 on"
    findings.info("annotation-ids", message, count=len(ids))
    return np.arange(1, len(ids) + 1)


def box_array(rows: list[Any], file: Path, findings: Findings) -> NDArray[np.float64]:
    """Return boxes (N, 4) float64 xywh of pixels; report other rows and make them zeros (empty boxes)."""
    try:
        boxes = np.array(rows, dtype=np.float64) if bool not in _types_in(rows) else np.empty(0)
    except (ValueError, TypeError, OverflowError):
        boxes = np.empty(0)
    if boxes.shape != (len(rows), 4):
        numbers = [[None if isinstance(value, bool) else _number(value) for value in row] for row in rows]
        boxes = np.array(
            [[math.nan] * 4 if len(row) != 4 or None in row else row for row in numbers], dtype=np.float64
        ).reshape(-1, 4)
    bad = np.flatnonzero(~(np.abs(boxes) <= _MAX_COORDINATE).all(axis=1))  # NaN too
    if len(bad):
        place = f"annotations[{bad[0]}]"
        findings.error(
            "malformed-boxes",
            f"{file}: {place} has the 'bbox' {_shown(rows[bad[0]])}, expected [x, y, width, height] in pixels "
            f"({len(bad)} such boxes); repair or remove it",
            count=len(bad),
            example=place,
        )
        boxes[bad] = 0.0
    return boxes


def _flags(annotations: Entries, key: str, file: Path, findings: Findings) -> NDArray[np.bool_]:
    """Return True (N,) where a key is 1; a missing one or null is 0."""
    numbers = np.nan_to_num(number_column(annotations, key, file, findings, are_flags=True))
    _report_bad(annotations, key, np.flatnonzero(~np.isin(numbers, (0, 1))), "0 or 1", file, findings)
    return numbers == 1


def number_column(
    annotations: Entries, key: str, file: Path, findings: Findings, *, are_flags: bool = False
) -> NDArray[np.float64]:
    """Return the numbers (N,) of a key, NaN where it is missing or null; report what is no number.

    `true` and `false` are numbers only where `are_flags`.
    """
    values = [entry.get(key) for entry in annotations]
    try:
        array = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        array = np.empty(0)
    is_sound = array.shape == (len(values),) and not (np.abs(array) > _MAX_NUMBER).any()
    if is_sound and (are_flags or bool not in _types_in([values])):
        return array
    numbers = [None if isinstance(value, bool) and not are_flags else _number(value) for value in values]
    bad = [row for row, number in enumerate(numbers) if number is None]
    _report_bad(annotations, key, bad, "a number", file, findings)
    return np.array([math.nan if number is None else number for number in numbers])


def _report_bad(
    annotations: Entries,
    key: str,
    rows: Sequence[int] | NDArray[np.int64],
    expected: str,
    file: Path,
    findings: Findings,
) -> None:
    if len(rows):
        place = f"annotations[{rows[0]}]"
        findings.error(
            f"malformed-{key}",
            f"{file}: {place} has {_shown(annotations[rows[0]].get(key))} for '{key}', expected {expected} "
            f"({len(rows)} such annotations); correct or remove it",
            count=len(rows),
            example=place,
        )


@contextlib.contextmanager
def _paused_gc() -> Iterator[None]:
    """Pause garbage collection, which would walk the growing heap again and again and nearly double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
