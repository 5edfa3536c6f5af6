"""COCO: read `annotations/instances_<split>.json` with the images in `<split>/`, and convert a data set to COCO."""

import contextlib
import gc
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.dataset import Category, ImageSet, positions_of
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.format import ALL, COLUMNS, BoxTable, DataFormat, LabelContent, Labels, select_rows
from aligndet_cli.data.images import read_size_hw
from aligndet_cli.data.index import LabelIndex
from aligndet_cli.data.segmentations import Segmentations, SegmentationWriter
from aligndet_cli.data.splits import as_split_name
from aligndet_cli.errors import DataError

_PREFIX = "instances_"
_FOLD = re.compile(r"\.\d+@[\d.]+(-unlabeled)?$")
_ROBOFLOW_NAME = "_annotations.coco.json"


@dataclass(frozen=True)
class CocoSplit:
    """A label file, and the folders in which its images may lie, most likely first."""

    root: Path
    name: str
    annotations: Path
    image_dirs: tuple[Path, ...]

    def read(self, findings: Findings, *, with_masks: bool, index_dir: Path | None) -> Labels:
        """See `SplitSource`. Class ids follow ascending category ids."""
        # An index holds no errors, so only strict findings may use it.
        index = LabelIndex.of(
            self.annotations, index_dir if findings.is_strict else None, "masks" if with_masks else "boxes"
        )
        content = _from_index(index)
        if content is None:
            content = _parse(self.annotations, with_masks=with_masks, findings=findings)
            if index is not None:
                _to_index(index, content)
                content = _from_index(index) or content  # mapped: frees the copy of the masks
        content.file_names = _with_slashes(content.file_names, self.image_dirs)
        return Labels(
            format="coco",
            root=self.root,
            split=self.name,
            images_dir=_images_dir(self, content.file_names),
            annotations=self.annotations,
            **vars(content),
        )


def find_coco_splits(root: Path) -> dict[str, CocoSplit]:
    """Return splits by name: `annotations/instances_*.json`, or Roboflow's `_annotations.coco.json` beside images.

    Roboflow's file lies in a folder for each split; `root` may be one of these folders, too.
    """
    splits = {}
    for file in sorted((root / "annotations").glob(f"{_PREFIX}*.json")):
        name = file.stem.removeprefix(_PREFIX)
        splits[name] = CocoSplit(root, name, file, (*image_dirs(root, name), root))
    for file in sorted([*root.glob(_ROBOFLOW_NAME), *root.glob(f"*/{_ROBOFLOW_NAME}")]):
        name = as_split_name(file.parent.resolve().name) or ALL if file.parent == root else file.parent.name
        splits.setdefault(name, CocoSplit(root, name, file, (file.parent,)))
    return splits


COCO = DataFormat("coco", "annotations/instances_*.json (COCO)", find_coco_splits)


def image_dirs(root: Path, split: str) -> tuple[Path, ...]:
    """Return the folders that may hold the images of a split, most likely first.

    A fold such as `train.1@10` shares the image folder of its full split.
    """
    whole = _FOLD.sub("", split)
    names = dict.fromkeys((split, whole))
    return (*(folder / name for folder in (root, root / "images") for name in names), root / "images")


def _parse(file: Path, *, with_masks: bool, findings: Findings) -> LabelContent:
    masks = SegmentationWriter() if with_masks else None
    content, digest = _load(file, masks)
    with _paused_gc():
        images, annotations = _entries(content, file, findings)
        image_ids = _id_array([image["id"] for image in images], file)
        categories = _categories(content["categories"], file, findings)
        table = _boxes(annotations, image_ids, categories, file, findings)
        if masks is not None:
            table.segmentations = masks.finish(entry.get("segmentation", (0, 0)) for entry in annotations)
        is_known = (table.image_index >= 0) & (table.class_ids >= 0)
        return LabelContent(
            file_names=[image["file_name"] for image in images],
            image_ids=image_ids,
            sizes_hw=_sizes_hw(images, file, findings),
            table=table if is_known.all() else select_rows(table, np.flatnonzero(is_known)),
            categories=categories,
            label_digest=digest,
        )


def _to_index(index: LabelIndex, content: LabelContent) -> None:
    table, segmentations = content.table, content.table.segmentations
    arrays: dict[str, NDArray[Any]] = {
        "image_ids": content.image_ids,
        "sizes_hw": content.sizes_hw,
        **{name: getattr(table, name) for name in COLUMNS},
    }
    if segmentations is not None:
        arrays["segmentation_starts"], arrays["segmentation_ends"] = segmentations.starts, segmentations.ends
        arrays["segmentation_text"] = segmentations.text
    categories = [[category.category_id, category.name] for category in content.categories]
    about = {"label_digest": content.label_digest, "categories": categories, "file_names": content.file_names}
    index.save(about, arrays)


def _from_index(index: LabelIndex | None) -> LabelContent | None:
    loaded = None if index is None else index.load()
    if loaded is None:
        return None
    content, arrays = loaded
    segmentations = None
    if "segmentation_text" in arrays:
        names = ("segmentation_text", "segmentation_starts", "segmentation_ends")
        segmentations = Segmentations(*(arrays[name] for name in names))
    return LabelContent(
        file_names=content["file_names"],
        image_ids=np.array(arrays["image_ids"]),
        sizes_hw=np.array(arrays["sizes_hw"]),
        table=BoxTable(**{name: np.array(arrays[name]) for name in COLUMNS}, segmentations=segmentations),
        categories=tuple(Category(category_id, name) for category_id, name in content["categories"]),
        label_digest=content["label_digest"],
    )


def to_coco_dict(image_set: ImageSet) -> dict[str, Any]:
    """Return the data set as a COCO json for pycocotools, with the original image and category ids.

    Boxes come from the image set (clipped, without degenerate boxes). Annotation ids count from 1, since pycocotools
    takes 0 for "unmatched". Sizes that the labels lack are read from the image files.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    category_ids = [category.category_id for category in image_set.categories]
    for index in range(len(image_set)):
        record = image_set.record(index)
        height, width = record.size_hw or read_size_hw(record.path)
        images.append({"id": record.image_id, "file_name": record.file_name, "height": height, "width": width})
        for row, (x1, y1, x2, y2) in enumerate(record.boxes.astype(np.float64).tolist()):
            entry = {
                "id": len(annotations) + 1,
                "image_id": record.image_id,
                "category_id": category_ids[record.class_ids[row]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(record.areas[row]),
                "iscrowd": int(record.is_crowd[row]),
            }
            if record.segmentations:
                entry["segmentation"] = record.segmentations[row]
            annotations.append(entry)
    categories = [{"id": category.category_id, "name": category.name} for category in image_set.categories]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


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


def _load(file: Path, masks: SegmentationWriter | None) -> tuple[dict[str, Any], str]:
    """Return the parsed json and the hash of its bytes.

    Polygons are most of the bytes, so parsing drops them; with `masks`, they move there and only their place stays.
    """

    def without_polygons(entry: dict[str, Any]) -> dict[str, Any]:
        segmentation = entry.pop("segmentation", None)
        if masks is not None and segmentation:
            entry["segmentation"] = masks.add(segmentation)
        return entry

    try:
        raw = file.read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        text = raw.decode("utf-8-sig")
        del raw
        with _paused_gc():
            content = json.loads(text, object_hook=without_polygons)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; check --annotations") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{file}: not valid JSON ({error}); is the download complete?") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file}: no list '{key}' at its top level; expected a COCO instances json")
    return content, digest


def _entries(
    content: dict[str, Any], file: Path, findings: Findings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the images (with unique ids) and annotations that have the needed keys and types."""
    images = _well_formed(content["images"], {"id": int, "file_name": str}, f"{file}: images", findings)
    kinds: dict[str, type] = {"image_id": int, "category_id": int, "bbox": list}
    annotations = _well_formed(content["annotations"], kinds, f"{file}: annotations", findings)
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
    return images, annotations


def _well_formed(entries: list[Any], kinds: dict[str, type], where: str, findings: Findings) -> list[dict[str, Any]]:
    """Return the entries that are objects with the wanted keys and types; report the others."""
    wanted = tuple(kinds.items())
    good = [
        entry for entry in entries if type(entry) is dict and all(type(entry.get(key)) is kind for key, kind in wanted)
    ]
    if len(good) < len(entries):
        kept = set(map(id, good))
        position = next(index for index, entry in enumerate(entries) if id(entry) not in kept)
        bad = entries[position]
        key, kind = next(
            (pair for pair in wanted if type(bad) is not dict or type(bad.get(pair[0])) is not pair[1]), wanted[0]
        )
        state = "has no" if type(bad) is not dict or key not in bad else f"has a bad ({type(bad[key]).__name__})"
        count = len(entries) - len(good)
        findings.error(
            "malformed-entries",
            f"{where}[{position}] {state} '{key}', expected {kind.__name__} ({count} such entries); "
            "repair or remove it",
            count=count,
            example=f"{where}[{position}]",
        )
    return good


def _sizes_hw(images: list[dict[str, Any]], file: Path, findings: Findings) -> NDArray[np.int32]:
    """Return (B, 2) heights and widths, zeros where the json lacks one; report what is no size."""
    sizes = [tuple(_side(image.get(key)) for key in ("height", "width")) for image in images]
    bad = [index for index, size in enumerate(sizes) if None in size]
    if bad:
        image = images[bad[0]]
        findings.error(
            "malformed-sizes",
            f"{file}: images[{bad[0]}] has height {image.get('height')!r} and width {image.get('width')!r}, expected "
            f"whole numbers ({len(bad)} such images); correct or remove them",
            count=len(bad),
            example=image["file_name"],
        )
    known = [size if all(size) else (0, 0) for size in sizes]
    return np.array(known, dtype=np.int32).reshape(-1, 2)


def _side(value: Any) -> int | None:
    """Return a side in pixels, as a whole number in whatever type it is written; 0 if unknown, None for no size."""
    if value is None or value == 0 or value == "":
        return 0
    try:
        side = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return int(side) if side.is_integer() and 0 < side < 2**31 else None


def _categories(entries: list[Any], file: Path, findings: Findings) -> tuple[Category, ...]:
    found = {
        entry["id"]: Category(entry["id"], str(entry.get("name", entry["id"])))
        for entry in _well_formed(entries, {"id": int}, f"{file}: categories", findings)
    }
    if len(found) < len(entries):
        findings.error("duplicate-category-ids", f"{file}: categories have equal ids; make them unique")
    return tuple(found[category_id] for category_id in sorted(found))


def _boxes(
    annotations: list[dict[str, Any]],
    image_ids: NDArray[np.int64],
    categories: tuple[Category, ...],
    file: Path,
    findings: Findings,
) -> BoxTable:
    """Return all annotations as arrays; `image_index` or `class_ids` is -1 for an unknown id."""
    category_ids = _id_array([category.category_id for category in categories], file)
    image_column = _id_array([entry["image_id"] for entry in annotations], file)
    category_column = _id_array([entry["category_id"] for entry in annotations], file)
    image_index = positions_of(image_column, image_ids)
    class_ids = positions_of(category_column, category_ids)
    for code, positions, column, what in (
        ("unknown-image-ids", image_index, image_column, "image"),
        ("unknown-category-ids", class_ids, category_column, "category"),
    ):
        unknown = np.flatnonzero(positions < 0)
        if len(unknown):
            value = int(column[unknown[0]])
            findings.error(
                code,
                f"{file}: annotations[{unknown[0]}] has {what} id {value}, which is not listed "
                f"({len(unknown)} such annotations); add the {what} or remove them",
                count=len(unknown),
                example=f"{what} id {value}",
            )
    boxes = _box_array([entry["bbox"] for entry in annotations], file, findings)  # (N, 4) xywh
    boxes[:, 2:] += boxes[:, :2]
    return BoxTable(
        image_index=image_index,
        boxes=boxes,
        class_ids=class_ids,
        areas=_number_array([entry.get("area", np.nan) for entry in annotations]),
        is_crowd=_number_array([entry.get("iscrowd", 0) for entry in annotations]) == 1,
    )


def _id_array(ids: list[int], file: Path) -> NDArray[np.int64]:
    try:
        return np.array(ids, dtype=np.int64)
    except OverflowError:
        raise DataError(f"{file}: an id does not fit into 64 bits ({max(ids, key=abs)}); renumber it") from None


def _box_array(rows: list[Any], file: Path, findings: Findings) -> NDArray[np.float64]:
    """Return boxes (N, 4) float64 xywh; report rows that are not four numbers and make them zeros (empty boxes)."""
    try:
        return np.array(rows, dtype=np.float64).reshape(len(rows), 4)
    except (ValueError, TypeError):
        numbers = (int, float)
        bad = [n for n, row in enumerate(rows) if len(row) != 4 or not all(isinstance(value, numbers) for value in row)]
        findings.error(
            "malformed-boxes",
            f"{file}: annotations: 'bbox' {rows[bad[0]]} is not [x, y, width, height] "
            f"({len(bad)} such boxes); repair or remove it",
            count=len(bad),
            example=str(rows[bad[0]]),
        )
        for index in bad:
            rows[index] = [0.0, 0.0, 0.0, 0.0]
        return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _number_array(values: list[Any]) -> NDArray[np.float64]:
    """Return (N,) float64, NaN for values that are not numbers."""
    try:
        return np.array(values, dtype=np.float64).reshape(len(values))
    except (ValueError, TypeError):
        return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=np.float64)


def _with_slashes(file_names: list[str], folders: tuple[Path, ...]) -> list[str]:
    r"""Return names with `/` for the `\` that tools on Windows write, except names of files that are there."""
    if not any("\\" in name for name in file_names):
        return file_names
    return [
        name if any((folder / name).is_file() for folder in folders) else name.replace("\\", "/") for name in file_names
    ]


def _images_dir(split: CocoSplit, file_names: list[str]) -> Path:
    """Return the first folder that holds the first image, else the first folder that exists.

    Raises:
        DataError: none of the folders exists.
    """
    existing = [folder for folder in split.image_dirs if folder.is_dir()]
    if not existing:
        raise DataError(f"{split.image_dirs[0]}: no such image folder for {split.annotations}; name it with --images")
    holding = [folder for folder in existing if file_names and (folder / file_names[0]).is_file()]
    return (holding or existing)[0]
