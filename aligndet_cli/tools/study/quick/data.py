"""A labelled data set to answer the question on: what to train on, what to measure on, and its sizes. Free of torch."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aligndet_cli.config import DataConfig
from aligndet_cli.data.coco import to_coco_dict
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.findings import counted
from aligndet_cli.data.open import locate_data, open_images
from aligndet_cli.data.splits import choose_split
from aligndet_cli.data.stray import require_boxes
from aligndet_cli.errors import DataError
from aligndet_cli.files import write_bytes

HELD_OUT = 5  # one in so many images is measured on where there is no split for it
_FEWEST = 4  # images to train and to measure on
_USUAL_HW = (480, 640)  # where no image tells its size


@dataclass(frozen=True)
class Sizes:
    """Sizes of a data set's images and objects.

    Attributes:
        short_side: median short side of the images in pixels.
        aspect: median of long by short side.
        object_side: median of the objects' sides, the root of their area, by the short side of their image.
    """

    short_side: float
    aspect: float
    object_side: float


@dataclass(frozen=True)
class LabelledData:
    """A data set with labels.

    Attributes:
        train: images to train on; if some are held out, with these.
        val: images to measure on; None: some of `train` are held out.
    """

    root: Path
    train: ImageSet
    val: ImageSet | None

    @cached_property
    def held_out(self) -> list[int]:
        """Positions in `train` of the images that are held out to measure on."""
        if self.val is not None:
            return []
        order = np.random.RandomState(0).permutation(len(self.train))
        return sorted(order[: max(len(self.train) // HELD_OUT, 1)].tolist())

    @property
    def num_train(self) -> int:
        """Number of images to train on."""
        return len(self.train) - len(self.held_out)

    @property
    def num_val(self) -> int:
        """Number of images to measure on."""
        return len(self.held_out) if self.val is None else len(self.val)

    def describe(self) -> str:
        """Return what is taken, in words."""
        train = self.train
        boxes = counted(len(train.boxes), "box", "boxes")
        classes = counted(len(train.categories), "class", "classes")
        measured = f"'{self.val.split}'" if self.val is not None else f"drawn from '{train.split}', the only split"
        return (
            f"{self.root} ({train.format}): {boxes} of {classes}; {self.num_train} images of '{train.split}' to train "
            f"on, {self.num_val} to measure on ({measured})"
        )

    def sizes(self) -> Sizes:
        """Return the sizes of images and objects; those of usual photographs where none is known."""
        train = self.train
        known = train.sizes_hw.min(axis=1) > 0
        sizes_hw = train.sizes_hw[known] if known.any() else np.array([_USUAL_HW])
        short = sizes_hw.min(axis=1)
        image_of_box = np.repeat(np.arange(len(train)), np.diff(train.offsets))
        kept = known[image_of_box] & ~train.is_crowd
        corners = train.boxes[kept]
        areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        sides = np.sqrt(areas) / train.sizes_hw[image_of_box[kept]].min(axis=1)
        return Sizes(
            float(np.median(short)),
            float(np.median(sizes_hw.max(axis=1) / short)),
            float(np.median(sides)) if len(sides) else 0.2,
        )

    def held_out_settings(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Return the settings, by table of a study, that name the labels in `folder`; none if nothing is held out."""
        if self.val is not None:
            return {}
        train, val = (str(folder.absolute() / f"instances_{name}.json") for name in ("train", "val"))
        images_dir = str(self.train.images_dir.absolute())
        return {
            "common": {"data.annotations": train, "data.images": images_dir},
            "evaluate": {"data.annotations": val},
        }

    def write_held_out(self, folder: Path) -> None:
        """Write the labels of both parts as COCO files if some images are held out."""
        if self.val is not None:
            return
        whole = to_coco_dict(self.train)
        chosen = set(self.held_out)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "val"):
            images = [image for place, image in enumerate(whole["images"]) if (place in chosen) == (name == "val")]
            ids = {image["id"] for image in images}
            boxes = [entry for entry in whole["annotations"] if entry["image_id"] in ids]
            content = {**whole, "images": images, "annotations": boxes}
            write_bytes(folder / f"instances_{name}.json", json.dumps(content).encode())


def open_labelled(root: Path) -> LabelledData:
    """Find a data set, the split to train on and the one to measure on.

    Raises:
        DataError: nothing there, no labels, or too few images.
    """
    train = open_images(DataConfig(root=root), purpose="train", with_truths=True)
    require_boxes(train, "a study compares detectors, which need labelled images")
    data = LabelledData(root, replace(train, segmentations=None), _open_measured(root))
    if data.num_train + data.num_val < _FEWEST:
        raise DataError(f"{root}: {counted(len(train), 'labelled image')}; a study needs {_FEWEST} at least")
    return data


def _open_measured(root: Path) -> ImageSet | None:
    """Return the split to measure on; None if there is none."""
    found = locate_data(root)
    try:
        choose_split(found.root, list(found.splits), None, "val")
    except DataError:
        return None
    val = open_images(DataConfig(root=root), purpose="val")
    if lack := val.lack_of_boxes() or ("" if val.has_labels else f"{root}: no labels for split '{val.split}'"):
        raise DataError(f"{lack}; there is nothing to measure on")
    return val
