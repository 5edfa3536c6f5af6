"""Names and ids of the classes that published detectors were trained on."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aligndet_cli.data.dataset import Category
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.tools.conversion.mmdet_config import class_names

# Source: COCO 2017, in the order of their ids 1 to 90, of which ten are not used (None).
COCO_NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", None, "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep"),
    *("cow", "elephant", "bear", "zebra", "giraffe", None, "backpack", "umbrella", None, None),
    *("handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat"),
    *("baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", None, "wine glass", "cup", "fork"),
    *("knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza"),
    *("donut", "cake", "chair", "couch", "potted plant", "bed", None, "dining table", None, None, "toilet"),
    *(None, "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", None, "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
# Source: PASCAL VOC 2007, alphabetically; ids as our reader gives them.
VOC_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_UNUSED_NAME = "N/A"  # as in the lists of DETR and torchvision
_BY_ID = tuple(
    Category(category_id, _UNUSED_NAME, is_unused=True) if name is None else Category(category_id, name)
    for category_id, name in enumerate(COCO_NAMES, start=1)
)
COCO = tuple(category for category in _BY_ID if not category.is_unused)
VOC = tuple(Category(category_id, name) for category_id, name in enumerate(VOC_NAMES, start=1))
# Models whose class id is COCO's id have a class for each unused id, and one for 0. R-CNNs of torchvision have a
# background in place of 0, and thus `_BY_ID`.
COCO_BY_ID = (Category(0, _UNUSED_NAME, is_unused=True), *_BY_ID)
KNOWN = {"coco": (COCO, _BY_ID, COCO_BY_ID), "voc": (VOC,)}


def resolve_categories(
    asked: str | None, num_classes: int, meta: Mapping[str, Any], file: Path
) -> tuple[Category, ...]:
    """Return the classes of a detector, in the order of their class ids.

    Where several classes have one name, they are taken in the order of their category ids.

    Args:
        asked: "coco", "voc", or a COCO json with `categories`. None: by the names in the file; without names, COCO if
            their number is COCO's.
        meta: meta data of the checkpoint, in which mmdetection keeps names.

    Raises:
        ConfigError: a choice that does not fit the detector.
        WeightsError: the classes cannot be found out.
    """
    names = class_names(meta)
    if names is not None and len(names) != num_classes:
        if asked is None:
            raise WeightsError(
                f"{file}: names {len(names)} classes, but has {num_classes}; name them with --categories FILE.json"
            )
        names = None
    tables = _tables(asked, names)
    for table in tables:
        if len(table) == num_classes and names is None:
            return table
        if names is not None and sorted(names) == sorted(category.name for category in table):
            by_name: dict[str, list[Category]] = defaultdict(list)
            for category in table:
                by_name[category.name].append(category)
            return tuple(by_name[name].pop(0) for name in names)
    if asked is not None:
        given = f"{num_classes} classes" + (f" ({', '.join(names[:3])}, ...)" if names else "")
        raise ConfigError(f"--categories {asked}: {file} has {given}; name a COCO json with just those categories")
    if names is None:
        voc = "voc (Pascal VOC) or " if num_classes == len(VOC) else ""
        raise WeightsError(f"{file}: {num_classes} classes without names; name them with --categories {voc}FILE.json")
    return tuple(Category(number, name) for number, name in enumerate(names, start=1))


def _tables(asked: str | None, names: tuple[str, ...] | None) -> list[tuple[Category, ...]]:
    """Return the lists of classes that may be meant."""
    if asked is not None:
        return list(KNOWN[asked]) if asked in KNOWN else [_read_categories(Path(asked))]
    if names is None:
        return list(KNOWN["coco"])  # of its number of classes; detectors of 20 classes need not be Pascal VOC's
    return [table for tables in KNOWN.values() for table in tables]


def _read_categories(file: Path) -> tuple[Category, ...]:
    """Return the categories of a COCO json, in the order of their ids."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["categories"]
        found = [Category(int(entry["id"]), str(entry["name"])) for entry in entries]
    except OSError as error:
        raise ConfigError(f"--categories {file}: {error.strerror}; write coco, voc or the path of a json") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--categories {file}: not a COCO json with 'categories' (id and name each)") from None
    return tuple(sorted(found, key=lambda category: category.category_id))
