"""The layouts of all formats: those that a data set may have, and those that count only if all of it fits."""

from collections.abc import Mapping
from pathlib import Path

from aligndet_cli.data.coco import COCO
from aligndet_cli.data.coco_layouts import LOOSE_COCO
from aligndet_cli.data.format import SplitSource
from aligndet_cli.data.voc import VOC
from aligndet_cli.data.voc_layouts import LOOSE_VOC
from aligndet_cli.data.yolo import YOLO
from aligndet_cli.data.yolo_layouts import LOOSE_YOLO

FORMATS = (COCO, VOC, YOLO)  # the first that recognises a folder wins; images without labels are the format `folder`
LOOSE_FORMATS = (LOOSE_COCO, LOOSE_VOC, LOOSE_YOLO)  # none wins where another fits, too


def find_loose_splits(root: Path, kind: str) -> dict[str, Mapping[str, SplitSource]]:
    """Return the splits of a folder by each of the loose formats that fit, of one `kind` or `auto`.

    Raises:
        DataError: a list of classes cannot be read.
    """
    found = {known.name: known.find(root) for known in LOOSE_FORMATS if kind in ("auto", known.name)}
    return {name: splits for name, splits in found.items() if splits}
