"""One split of a data set as one record, whatever its format on disk. Free of torch."""

import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.boxes import BoxTable
from aligndet_cli.data.findings import Findings
from aligndet_cli.data.segmentations import Segmentations

# Kinds of letters that break a line or cannot be written: controls, line and paragraph ends, halves of pairs.
_UNSHOWN = frozenset({"Cc", "Zl", "Zp", "Cs"})


@dataclass(frozen=True)
class Category:
    """A class of a data set or of a detector.

    Attributes:
        category_id: id in the label files.
        name: any text; classes of different ids may have equal names.
        is_unused: True for an output of a detector that stands for no class of any data, as DETR has for some ids.
    """

    category_id: int
    name: str
    is_unused: bool = False


def class_labels(names: Mapping[int, str], taken: Collection[str] = ()) -> dict[int, str]:
    """Return a label of each class by category id: its name in one line, with the id if other texts are the same.

    A blank name stands in quotes.

    Args:
        names: by category id; shortened if the place is small, so that the ids are not cut off.
        taken: texts beside the labels that stand for something else, such as "background".
    """
    lines = {number: one_line(name) if name.strip() else repr(name) for number, name in names.items()}
    counts = Counter([*lines.values(), *taken])
    with_ids = {number: f"{line} (id {number})" for number, line in lines.items()}
    labels = {number: line if counts[line] == 1 else with_ids[number] for number, line in lines.items()}
    # A class may be called "cat (id 1)".
    return labels if len({*labels.values(), *taken}) == len(labels) + len(taken) else with_ids


def report_equal_names(categories: Sequence[Category], findings: Findings) -> None:
    """Warn of classes that have one name: they are different classes all the same."""
    ids_of: dict[str, list[str]] = {}
    for category in categories:
        ids_of.setdefault(category.name, []).append(str(category.category_id))
    equal = {name: ids for name, ids in ids_of.items() if len(ids) > 1}
    if equal:
        name, ids = next(iter(equal.items()))
        both = "both" if len(ids) == 2 else "all"
        more = f" (and {len(equal) - 1} more such names)" if len(equal) > 1 else ""
        message = f"classes {', '.join(ids[:-1])} and {ids[-1]} are {both} called '{one_line(name)}'{more}: "
        message += "they are learned and counted apart; rename one, or give their boxes one id"
        findings.warn("equal-class-names", message, count=len(equal), example=one_line(name))


def one_line(name: str) -> str:
    r"""Return a name with escapes, such as `\n`, for letters that break a line or cannot be written."""
    return "".join(ascii(letter)[1:-1] if unicodedata.category(letter) in _UNSHOWN else letter for letter in name)


@dataclass(frozen=True)
class ImageRecord:
    """One image and its labels. N = boxes.

    Attributes:
        image_id: id in the COCO json, else the position in the sorted list of all images.
        file_name: the path relative to the image folder, with `/`.
        size_hw: height and width in pixels after EXIF rotation; None if unknown, see `ImageSet`.
        boxes: (N, 4) float32, xyxy, absolute pixels, inside the image where its size is known.
        class_ids: (N,) int64, 0..K-1, the position in `ImageSet.categories`.
        areas: (N,) float32, square pixels; COCO's `area`, else the area of the box.
        is_crowd: (N,) bool; COCO `iscrowd` and `ignore`, VOC `difficult`: not trained on.
        segmentations: COCO polygons or RLE per box, `[]` if missing; an empty list if not asked for.
    """

    image_id: int
    path: Path
    file_name: str
    size_hw: tuple[int, int] | None
    boxes: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    areas: NDArray[np.float32]
    is_crowd: NDArray[np.bool_]
    segmentations: list[Any]


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set, held in flat arrays so that 118k images cost one allocation each, not millions.

    Attributes:
        format: `coco`, `voc`, `yolo` or `folder`.
        root: folder or file that the user named.
        split: name of the split as found, e.g. `train2017`.
        file_names: per image, relative to `images_dir`, in file order (the order of the COCO json, else sorted).
        image_ids: (B,) int64.
        sizes_hw: (B, 2) int32; 0 if neither the labels nor the file header tell it, and in plain folders.
        offsets: (B + 1,) int64; boxes of image i are rows offsets[i]:offsets[i + 1].
        boxes, class_ids, areas, is_crowd: all boxes, see `ImageRecord`.
        segmentations: one entry per box; None if masks were not asked for.
        categories: the classes; position = class id. Empty when there are no labels (`has_labels` False).
        fingerprint: hash of the label files and the image list; equal for equal data in any place.
        problems: number of corrections and omissions while reading, by kind, e.g. `{"degenerate boxes": 2}`.
        annotations: the COCO json that holds the labels; None for other formats.
        truths: boxes as the COCO json says them, before they are clipped or left out, in its order; None for other
            formats or if not asked for.
    """

    format: str
    root: Path
    split: str
    images_dir: Path
    file_names: list[str]
    image_ids: NDArray[np.int64]
    sizes_hw: NDArray[np.int32]
    offsets: NDArray[np.int64]
    boxes: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    areas: NDArray[np.float32]
    is_crowd: NDArray[np.bool_]
    segmentations: Segmentations | None
    categories: tuple[Category, ...]
    fingerprint: str
    problems: dict[str, int]
    annotations: Path | None = None
    truths: BoxTable | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.file_names)

    @property
    def has_labels(self) -> bool:
        """True if this split has boxes with classes."""
        return bool(self.categories)

    def lack_of_boxes(self) -> str:
        """Return one line if the labels hold no box that a detector could be trained on, else ""."""
        if not self.has_labels or not self.is_crowd.all():
            return ""
        count = len(self.boxes)
        cause = f"all {count} are crowds, difficult or to be ignored" if count else "finetune needs labelled images"
        return f"{self.root}: no boxes to train on in the labels of split '{self.split}'; {cause}"

    def aspects(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """Return width / height (N,) float64 of these images, 1 if unknown."""
        height, width = np.maximum(self.sizes_hw[np.asarray(indices, dtype=np.int64)], 1).T.astype(np.float64)
        return np.asarray(width / height)

    def record(self, index: int) -> ImageRecord:
        """Return the image at a position, with views (not copies) of its boxes."""
        first, last = int(self.offsets[index]), int(self.offsets[index + 1])
        rows = slice(first, last)
        height, width = (int(value) for value in self.sizes_hw[index])
        return ImageRecord(
            image_id=int(self.image_ids[index]),
            path=self.images_dir / self.file_names[index],
            file_name=self.file_names[index],
            size_hw=(height, width) if height else None,
            boxes=self.boxes[rows],
            class_ids=self.class_ids[rows],
            areas=self.areas[rows],
            is_crowd=self.is_crowd[rows],
            segmentations=[] if self.segmentations is None else [self.segmentations[row] for row in range(first, last)],
        )


def positions_of(values: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions (N,) int64 of values (N,) in `known` (M,), which is unique in any order; -1 if absent."""
    if not len(known):
        return np.full(len(values), -1, dtype=np.int64)
    order = np.argsort(known)
    slots = np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)
    found = order[slots]
    return np.where(known[found] == values, found, -1)
