"""Proposals as COCO json: read them for the images of a data set, and write a store."""

import collections
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.data.coco_json import box_array, categories_of, id_array, number_column, well_formed
from aligndet_cli.data.dataset import Category, ImageSet
from aligndet_cli.data.findings import Findings, counted
from aligndet_cli.data.text import decode_text, parse_json, read_label_bytes
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.logs import logger

CATEGORY = {"id": 1, "name": "selective_search"}  # the one category of the authors' file


@dataclass(frozen=True)
class GivenBoxes:
    """Boxes from another source for the images of an `ImageSet`, in its order.

    Attributes:
        boxes: (M, 4) float32, xyxy, absolute pixels.
        offsets: (B + 1,) int64; boxes of image i are rows offsets[i]:offsets[i + 1].
    """

    boxes: NDArray[np.float32]
    offsets: NDArray[np.int64]

    def of(self, index: int) -> NDArray[np.float32]:
        """Return the boxes (N, 4) of the image at a position."""
        return self.boxes[self.offsets[index] : self.offsets[index + 1]]


def boxes_from_labels(image_set: ImageSet) -> GivenBoxes:
    """Return ground-truth boxes without classes; crowds are left out, since a crowd is more than one object.

    Raises:
        DataError: the data has no labels.
    """
    if not image_set.has_labels:
        raise DataError(f"{image_set.root}: has no labels for split '{image_set.split}', so there are no boxes to take")
    single = ~image_set.is_crowd
    num_before = np.concatenate([[0], np.cumsum(single)]).astype(np.int64)
    return GivenBoxes(image_set.boxes[single], num_before[image_set.offsets])


def boxes_from_coco(file: Path, image_set: ImageSet) -> GivenBoxes:
    """Read the boxes of a COCO json for the images of a data set, by falling `score`, or in file order without scores.

    Images are matched by id, or by file name if the file's ids mean other images.

    Args:
        file: `{"images": [...], "annotations": [...]}`, or a bare list of annotations or predictions.

    Raises:
        DataError: not such a file, or none of its images is in the data set.
    """
    return _boxes_of(file, _read_coco(file), image_set)[0]


def classed_boxes_from_coco(
    file: Path, image_set: ImageSet
) -> tuple[GivenBoxes, NDArray[np.int64], tuple[Category, ...]]:
    """Read boxes as `boxes_from_coco` does, with the category id of each (M,) int64, and the categories by id.

    If the file lists no categories, they are the ids that its boxes name.

    Raises:
        DataError: as `boxes_from_coco`, or a box has no category of the file.
    """
    content = _read_coco(file)
    given, rows = _boxes_of(file, content, image_set)
    entries = _entries(content.annotations, {"category_id": int}, f"{file}: annotations")
    category_ids = id_array([entry["category_id"] for entry in entries], file)
    categories = _categories(file, content.categories) or tuple(
        Category(category_id, str(category_id)) for category_id in np.unique(category_ids).tolist()
    )
    unknown = np.flatnonzero(~np.isin(category_ids, [category.category_id for category in categories]))
    if len(unknown):
        raise DataError(
            f"{file}: 'categories' does not list category id {category_ids[unknown[0]]} of annotation {unknown[0]}"
        )
    return given, category_ids[rows], categories


def _boxes_of(file: Path, content: "_Content", image_set: ImageSet) -> tuple[GivenBoxes, NDArray[np.int64]]:
    """Return the boxes of the images of a data set, and the position (M,) int64 of each in the file's list."""
    file_ids, boxes, scores = _columns(file, content.annotations)
    position_by_file_id = _match(np.unique(file_ids).tolist(), content.images, image_set)
    _report_match(file, position_by_file_id, file_ids, image_set)
    positions = np.array([position_by_file_id.get(file_id, -1) for file_id in file_ids.tolist()], dtype=np.int64)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    if not has_area.all():
        logger.warning("%s: %s without area left out", file, counted(int((~has_area).sum()), "box", "boxes"))
    matched = np.flatnonzero((positions >= 0) & has_area)
    # By image, then by falling score; stable, so that equal scores keep the order of the file.
    order = matched[np.lexsort((-scores[matched], positions[matched]))]
    counts = np.bincount(positions[matched], minlength=len(image_set))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return GivenBoxes(boxes[order], offsets), order


def hash_file(file: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of a file.

    Raises:
        ConfigError: no such file.
    """
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"--import {file}: {(error.strerror or 'cannot be read').lower()}") from None


def export_coco(folder: Path, file: Path) -> None:
    """Write the store in `folder` as one COCO json, entry by entry: memory does not grow with the boxes.

    Raises:
        ConfigError: the file cannot be written.
    """
    store = ProposalStore(folder)
    part = file.with_name(f".{file.name}.tmp")
    images = (
        {"id": entry.image_id, "file_name": entry.file_name, "height": entry.size_hw[0], "width": entry.size_hw[1]}
        for entry in store.images()
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as handle:
            handle.write('{"images": [\n')
            handle.writelines(_joined(images))
            handle.write('],\n"annotations": [\n')
            handle.writelines(_joined(_annotation_dicts(store)))
            handle.write(f'],\n"categories": [{json.dumps(CATEGORY)}]}}\n')
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"--export {file}: {(error.strerror or 'cannot be written').lower()}") from None


def _annotation_dicts(store: ProposalStore) -> Iterator[dict[str, Any]]:
    annotation_id = 0
    for index, image_id in enumerate(store.image_ids.tolist()):
        # In float64 the differences of float32 coordinates are exact, so that an import gives the same boxes.
        for x1, y1, x2, y2 in store.boxes_of(index).astype(np.float64).tolist():
            annotation_id += 1
            width, height = x2 - x1, y2 - y1
            yield {
                "id": annotation_id,
                "image_id": image_id,
                "category_id": CATEGORY["id"],
                "bbox": [x1, y1, width, height],
                "area": width * height,
                "iscrowd": 0,
            }


def _joined(entries: Iterator[dict[str, Any]]) -> Iterator[str]:
    separator = ""
    for entry in entries:
        yield separator + json.dumps(entry)
        separator = ",\n"
    yield "\n"


class _Content(NamedTuple):
    """Lists in a json file; a bare list holds annotations."""

    annotations: list[dict[str, Any]]
    images: list[dict[str, Any]]
    categories: list[Any]


def _read_coco(file: Path) -> _Content:
    content = parse_json(decode_text(read_label_bytes(file), file), file)
    if isinstance(content, list):
        content = {"annotations": content}
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise DataError(f"{file}: no list 'annotations' in it; import needs a COCO json of boxes")
    images, categories = (content.get(key) or [] for key in ("images", "categories"))
    if not isinstance(images, list) or not isinstance(categories, list):
        raise DataError(f"{file}: 'images' and 'categories' must be lists; import needs a COCO json of boxes")
    return _Content(
        _entries(content["annotations"], {"image_id": int, "bbox": list}, f"{file}: annotations"),
        _entries(images, {"id": int}, f"{file}: images"),
        categories,
    )


def _entries(entries: list[Any], kinds: dict[str, type], where: str) -> list[dict[str, Any]]:
    """Return entries with whole ids.

    Raises:
        DataError: an entry that lacks a key or has another type.
    """
    return well_formed(entries, kinds, where, Findings(is_strict=True))


def _columns(
    file: Path, annotations: list[dict[str, Any]]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
    """Return image ids (M,) int64, boxes (M, 4) float32 xyxy and scores (M,) float64, 0 for a box without score.

    Raises:
        DataError: a box or a score is not made of finite numbers.
    """
    findings = Findings(is_strict=True)
    file_ids = id_array([entry["image_id"] for entry in annotations], file)
    boxes = box_array([entry["bbox"] for entry in annotations], file, findings)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.nan_to_num(number_column(annotations, "score", file, findings))
    return file_ids, boxes.astype(np.float32), scores


def _categories(file: Path, entries: list[Any]) -> tuple[Category, ...]:
    """Return the categories that the file lists, by id."""
    return categories_of(entries, file, Findings(is_strict=True))


def _match(file_ids: list[int], images: Sequence[Mapping[str, Any]], image_set: ImageSet) -> dict[int, int]:
    """Return positions in the data set by image id of the file, for the images that are in both.

    Equal paths mean the same image. Otherwise an id counts only if the names agree too (if the file has names): data
    sets without ids of their own number their images from 0, and would get another image's boxes.
    """
    position_by_id = {image_id: position for position, image_id in enumerate(image_set.image_ids.tolist())}
    position_by_path = {name: position for position, name in enumerate(image_set.file_names)}
    our_names = [PurePosixPath(path).name for path in image_set.file_names]
    num_by_name = collections.Counter(our_names)
    position_by_name = {name: position for position, name in enumerate(our_names) if num_by_name[name] == 1}
    path_by_file_id = {image["id"]: str(image.get("file_name", "")) for image in images}
    matched: dict[int, int] = {}
    for file_id in file_ids:
        path = path_by_file_id.get(file_id, "")
        name = PurePosixPath(path).name
        position = position_by_path.get(path)
        if position is None:
            position = position_by_id.get(file_id)
            if position is None or name not in ("", our_names[position]):
                position = position_by_name.get(name)
        if position is not None:
            matched[file_id] = position
    return matched


def _report_match(file: Path, matched: Mapping[int, int], file_ids: NDArray[np.int64], image_set: ImageSet) -> None:
    num_file_images = len(np.unique(file_ids))
    if not matched:
        raise DataError(
            f"{file}: none of its {num_file_images} images with boxes is among the {len(image_set)} images of "
            f"split '{image_set.split}', neither by id nor by file name; check --split"
        )
    if len(matched) < num_file_images:
        logger.warning(
            "%s: %d of its %d images are not in the data", file, num_file_images - len(matched), num_file_images
        )
    num_without = len(image_set) - len(set(matched.values()))
    if num_without:
        logger.warning("%s: has no boxes for %d of the %d images", file, num_without, len(image_set))
