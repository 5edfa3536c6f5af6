"""Low-data folds: draw their images and write them as COCO files. Free of torch.

Source: docs/paper.md §6.1; the files `instances_train2017.{fold}@{percent}.json` of Unbiased Teacher and Soft Teacher,
whose images and annotations keep the order of the full file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from aligndet_cli.config import DataConfig, StageConfig
from aligndet_cli.data.coco import CocoSplit, read_whole, to_coco_dict
from aligndet_cli.data.findings import counted
from aligndet_cli.data.open import locate_data, open_images
from aligndet_cli.data.splits import choose_split
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.files import write_bytes
from aligndet_cli.logs import logger

MAX_FOLD = 2**32 - 1  # the largest seed of NumPy's legacy generator
FOLDER = "semi_supervised"  # beside the labels, as in published layouts


class SplitConfig(StageConfig):
    """Settings of `aligndet split`; the defaults are the paper's folds (docs/paper.md §6.1)."""

    fractions: tuple[Annotated[float, Field(gt=0, lt=100)], ...] = Field(
        (1, 5, 10, 20), min_length=1, description="Percents of the images that a fold holds."
    )
    folds: tuple[Annotated[int, Field(ge=0, le=MAX_FOLD)], ...] = Field(
        (1, 2, 3, 4, 5), min_length=1, description="Numbers of the folds of each percentage."
    )
    output: Path | None = Field(None, description="Folder to write to (semi_supervised beside the labels).")
    # as `...-unlabeled.json`
    unlabeled: bool = Field(False, description="Also write the images that each fold leaves out.")


@dataclass(frozen=True)
class FoldFile:
    """One written file.

    Attributes:
        num_images, num_boxes: entries of the file.
    """

    file: Path
    percent: float
    fold: int
    num_images: int
    num_boxes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "file": str(self.file)}


def fraction_of(num_images: int, percent: float, fold: int) -> list[int]:
    """Draw the positions of a fold's images, in the order of drawing; 100 % gives all positions.

    Folds of one percentage are drawn independently of each other, so they overlap.

    Source: docs/paper.md §6.1: NumPy's legacy generator, seeded with the fold.

    Raises:
        ConfigError: no image is left.
    """
    if percent == 100:
        return list(range(num_images))
    count = int(percent / 100 * num_images)
    if count == 0:
        raise ConfigError(f"fraction {percent:g}: leaves none of the {num_images} images; take a larger one")
    return [int(index) for index in np.random.RandomState(fold).choice(num_images, count, replace=False)]


def write_folds(config: SplitConfig) -> list[FoldFile]:
    """Write the COCO json of every fold at every percentage, and return the files; other formats are converted to COCO.

    Raises:
        ConfigError: no data named, or a percentage that leaves no image.
        DataError: the labels cannot be read.
    """
    data = config.data
    content, split, beside, images = _whole(data)
    folder = config.output or beside / FOLDER
    places = range(len(content["images"]))
    pairs = dict.fromkeys((percent, fold) for percent in config.fractions for fold in config.folds)
    chosen = {(percent, fold): set(fraction_of(len(places), percent, fold)) for percent, fold in pairs}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for percent, fold in pairs:
        stem, own = f"instances_{split}.{fold}@{percent:g}", chosen[percent, fold]
        written.append(_write(folder / f"{stem}.json", content, own, percent, fold))
        if config.unlabeled:
            rest = set(places) - own
            written.append(_write(folder / f"{stem}-unlabeled.json", content, rest, percent, fold))
    place = f"{data.root or 'DATA'} --annotations {written[0].file}{f' --images {images}' if images else ''}"
    logger.info(f"to train on one: aligndet finetune {place}")
    return written


def _whole(data: DataConfig) -> tuple[dict[str, Any], str, Path, Path | None]:
    """Return the COCO json of the whole split, the split's name, the folder of its labels, and its image folder.

    The image folder is None if the json and the root are enough to find it.
    """
    if data.annotations is not None:
        stem = data.annotations.stem.removeprefix("instances_")
        return read_whole(data.annotations), stem, data.annotations.parent, data.images
    if data.root is None:
        raise ConfigError("which data? name its folder, or its labels with --annotations")
    root, kind, splits = locate_data(data.root, data.format)
    if kind == "coco":
        source = splits[choose_split(root, list(splits), data.split, "train")]
        assert isinstance(source, CocoSplit)
        images = source.image_dirs[0] if len(source.image_dirs) == 1 else None
        return read_whole(source.annotations), source.name, source.annotations.parent, images
    image_set = open_images(data, purpose="train", with_masks=True)
    if not image_set.has_labels:
        raise DataError(f"{root}: no labels for split '{image_set.split}'; folds are of labelled images")
    return to_coco_dict(image_set), image_set.split, root, image_set.images_dir


def _write(file: Path, whole: dict[str, Any], chosen: set[int], percent: float, fold: int) -> FoldFile:
    images = [image for position, image in enumerate(whole["images"]) if position in chosen]
    image_ids = {image["id"] for image in images}
    annotations = [entry for entry in whole["annotations"] if entry["image_id"] in image_ids]
    write_bytes(file, json.dumps({**whole, "images": images, "annotations": annotations}).encode())
    logger.info(f"{file}: {counted(len(images), 'image')}, {counted(len(annotations), 'box', 'boxes')}")
    return FoldFile(file, percent, fold, len(images), len(annotations))
