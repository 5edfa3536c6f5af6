"""COCO: read `annotations/instances_<split>.json` with the images in `<split>/`, and convert a data set to COCO."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.assembly import inside_folder
from aligndet_cli.data.boxes import COLUMNS, BoxTable, is_area
from aligndet_cli.data.coco_json import load_coco, parse_coco, read_content
from aligndet_cli.data.dataset import Category, ImageSet
from aligndet_cli.data.findings import Findings, counted
from aligndet_cli.data.format import ALL, DataFormat, LabelContent, Labels
from aligndet_cli.data.images import read_size_hw
from aligndet_cli.data.index import LabelIndex
from aligndet_cli.data.listing import is_file
from aligndet_cli.data.masks import check_segmentation
from aligndet_cli.data.segmentations import Segmentations
from aligndet_cli.data.splits import as_split_name
from aligndet_cli.errors import DataError
from aligndet_cli.logs import logger

_MASK_ARRAYS = ("block", "starts", "ends", "reach", "code_hw")  # of `Segmentations`
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
        """See `SplitSource`. Of file names with Windows' separators, those that name no file here are turned."""
        # An index holds no errors, so only strict findings may use it.
        index = LabelIndex.of(
            self.annotations, index_dir if findings.is_strict else None, "masks" if with_masks else "boxes"
        )
        content = _from_index(index)
        if content is None:
            content = parse_coco(self.annotations, with_masks=with_masks, findings=findings)
            if index is not None:
                _to_index(index, content)
                content = _from_index(index) or content  # mapped: frees the copy of the masks
        images_dir = _images_dir(self, content.file_names)
        content.file_names = [
            name.replace("\\", "/") if _is_of_windows(name) and not is_file(images_dir / name) else name
            for name in content.file_names
        ]
        return Labels(
            format="coco",
            root=self.root,
            split=self.name,
            images_dir=images_dir,
            annotations=self.annotations,
            **vars(content),
        )


def _is_of_windows(name: str) -> bool:
    """Return True for a relative file name with Windows' separators."""
    return "\\" in name and name[1:2] != ":" and not name.startswith("\\")


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


def _to_index(index: LabelIndex, content: LabelContent) -> None:
    table, segmentations = content.table, content.table.segmentations
    arrays: dict[str, NDArray[Any]] = {
        "image_ids": content.image_ids,
        "sizes_hw": content.sizes_hw,
        **{name: getattr(table, name) for name in COLUMNS},
    }
    if segmentations is not None:
        arrays |= {f"segmentation_{name}": getattr(segmentations, name) for name in _MASK_ARRAYS}
    categories = [[category.category_id, category.name] for category in content.categories]
    about = {
        "label_digest": content.label_digest,
        "categories": categories,
        "file_names": content.file_names,
    }
    index.save(about, arrays)


def _from_index(index: LabelIndex | None) -> LabelContent | None:
    loaded = None if index is None else index.load()
    if loaded is None:
        return None
    content, arrays = loaded
    segmentations = None
    if "segmentation_block" in arrays:
        segmentations = Segmentations(*(arrays[f"segmentation_{name}"] for name in _MASK_ARRAYS))
    return LabelContent(
        file_names=content["file_names"],
        image_ids=np.array(arrays["image_ids"]),
        sizes_hw=np.array(arrays["sizes_hw"]),
        table=BoxTable(**{name: arrays[name] for name in COLUMNS}, segmentations=segmentations),
        categories=tuple(Category(category_id, name) for category_id, name in content["categories"]),
        label_digest=content["label_digest"],
    )


def to_coco_dict(image_set: ImageSet) -> dict[str, Any]:
    """Return the data set as a COCO json for pycocotools, with the original image and category ids.

    Boxes are those of the label file where the set has them (see `ImageSet.truths`), since the corners of `ImageSet`
    are clipped and rounded to float32; else those of the set, numbered from 1, since pycocotools takes 0 for
    "unmatched". Sizes that the labels lack are read from the image files.
    """
    images: list[dict[str, Any]] = []
    for index in range(len(image_set)):
        record = image_set.record(index)
        height, width = record.size_hw or read_size_hw(record.path)
        images.append({"id": record.image_id, "file_name": record.file_name, "height": height, "width": width})
    categories = [{"id": category.category_id, "name": category.name} for category in image_set.categories]
    table = image_set.truths or _table_of(image_set)
    annotations = _annotations(table, image_set.image_ids, image_set.categories)
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def read_whole(file: Path) -> dict[str, Any]:
    """Return the whole content of a COCO json, in which what other programs may stumble over is converted.

    Entries keep their order and the keys that are not read here.

    Raises:
        DataError: the labels cannot be read.
    """
    content, digest = load_coco(file)
    findings = Findings(is_strict=True)
    labels = read_content(content, digest, file, findings)
    inside_folder(labels.file_names, file, findings)
    annotations = _annotations(labels.table, labels.image_ids, labels.categories)
    sizes = [{"height": height, "width": width} if height else {} for height, width in labels.sizes_hw.tolist()]
    names = {category.category_id: {"name": category.name} for category in labels.categories}
    pairs = [
        *zip(content["annotations"], annotations, strict=True),
        *zip(content["images"], sizes, strict=True),
        *((entry, names[entry["id"]]) for entry in content["categories"]),
    ]
    for entry, converted in pairs:
        entry.update({key: value for key, value in converted.items() if entry.get(key) != value})
    _check_masks(content["annotations"], labels, file)
    return content


def _check_masks(annotations: list[dict[str, Any]], labels: LabelContent, file: Path) -> None:
    """Write segmentations as other programs read them, and leave out those that cannot be drawn."""
    num_left_out = 0
    for entry, index in zip(annotations, labels.table.image_index.tolist(), strict=True):
        segmentation, (height, width) = entry.get("segmentation"), labels.sizes_hw[index].tolist()
        if not segmentation or not height:
            continue
        try:
            checked = check_segmentation(segmentation, (height, width))
        except DataError:  # doctor says which
            checked = []
        if not checked:
            num_left_out += 1
            del entry["segmentation"]
        elif isinstance(checked, list) and checked != segmentation:
            entry["segmentation"] = checked
    if num_left_out:
        masks = counted(num_left_out, "mask that cannot be drawn is", "masks that cannot be drawn are")
        logger.warning(f"{file}: {masks} left out; `aligndet doctor` tells more")


def _annotations(
    table: BoxTable, image_ids: NDArray[np.int64], categories: tuple[Category, ...]
) -> list[dict[str, Any]]:
    boxes = np.concatenate([table.boxes[:, :2], table.extents], axis=1)  # (N, 4) xywh
    areas = np.where(is_area(table.areas), table.areas, table.extents.prod(axis=1))
    category_ids = np.array([category.category_id for category in categories], dtype=np.int64)
    names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    columns = (
        table.ids,
        image_ids[table.image_index],
        category_ids[table.class_ids],
        boxes,
        areas,
        table.is_crowd.astype(np.int64),
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    entries = [dict(zip(names, row, strict=True)) for row in rows]
    if table.segmentations is not None:
        for row, entry in enumerate(entries):
            entry["segmentation"] = table.segmentations[row]
    return entries


def _table_of(image_set: ImageSet) -> BoxTable:
    """Return the boxes of an image set, as they are, as a table."""
    num_boxes = len(image_set.boxes)
    boxes = image_set.boxes.astype(np.float64)
    return BoxTable(
        image_index=np.repeat(np.arange(len(image_set)), np.diff(image_set.offsets)),
        boxes=boxes,
        class_ids=image_set.class_ids,
        areas=image_set.areas.astype(np.float64),
        is_crowd=image_set.is_crowd,
        is_ignored=np.zeros(num_boxes, dtype=np.bool_),
        extents=boxes[:, 2:] - boxes[:, :2],
        ids=np.arange(1, num_boxes + 1),
        segmentations=image_set.segmentations,
    )


def _images_dir(split: CocoSplit, file_names: list[str]) -> Path:
    """Return the first folder that holds the first image, else the first folder that exists.

    Raises:
        DataError: none of the folders exists.
    """
    existing = [folder for folder in split.image_dirs if folder.is_dir()]
    if not existing:
        raise DataError(f"{split.image_dirs[0]}: no such image folder for {split.annotations}; name it with --images")
    holding = [folder for folder in existing if file_names and is_file(folder / file_names[0])]
    return (holding or existing)[0]
