"""Images of the stage with their labels, if any: a class per folder, or boxes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.folder import FolderClasses, class_tree_splits, folder_classes
from aligndet_cli.data.open import locate_data, open_images
from aligndet_cli.errors import DataError
from aligndet_cli.pretrain_image.probe import Probe, ProbeRegions, regions_of_boxes

_TEST_SHARE = 0.2  # share of images to test on if there is no validation split
_MAX_REGIONS = 5000  # on either side of a probe; more would take long and change little


class NoBoxes:
    """No boxes for any image; see `BoxSource`."""

    def boxes_and_classes(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return empty arrays, (0, 4) and (0,)."""
        return np.empty((0, 4), dtype=np.float32), np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class ImageData:
    """Images to train on, and labels to judge the result with.

    Attributes:
        images: the training split.
        classes: classes of the images if there is a folder per class.
        probe: labelled regions; None without labels.
        indices: images to train on. With classes, test images of the probe are left out.
    """

    images: ImageSet
    classes: FolderClasses | None
    probe: Probe | None
    indices: list[int]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the training images and of images that are only tested on."""
        if self.probe is None or self.probe.test.image_set is self.images:
            return self.images.fingerprint
        return f"{self.images.fingerprint} {self.probe.test.image_set.fingerprint}"


def open_data(data: DataConfig, *, seed: int, index_dir: Path) -> ImageData:
    """Open the training images, and make a probe from the labels of the training and validation splits.

    Raises:
        DataError: the data cannot be read.
    """
    splits = _tree_splits(data)
    if splits:
        data = data.model_copy(update={"split": splits[0]})
    images = open_images(data, purpose="train", index_dir=index_dir)
    classes = folder_classes(images.file_names) if images.format == "folder" else None
    labelled = _regions(images, classes)
    held_out = _validation_regions(data, splits, images, classes, index_dir)
    indices = np.arange(len(images))
    if labelled is not None and held_out is None:
        labelled, held_out = labelled.split(_TEST_SHARE, seed)
        if classes is not None:
            indices = np.setdiff1d(indices, held_out.image_index)
    elif labelled is None and held_out is not None:
        labelled, held_out = held_out.split(_TEST_SHARE, seed)
    probe = None
    if labelled is not None and held_out is not None and len(np.unique(labelled.class_ids)) > 1 and len(held_out):
        probe = Probe(labelled.limited(_MAX_REGIONS), held_out.limited(_MAX_REGIONS))
    return ImageData(images, classes, probe, indices.tolist())


def _tree_splits(data: DataConfig) -> tuple[str, str] | None:
    if data.split is not None or data.root is None or data.images is not None or data.annotations is not None:
        return None
    root, kind, _ = locate_data(data.root, data.format)
    return class_tree_splits(root) if kind == "folder" else None


def _regions(images: ImageSet, classes: FolderClasses | None) -> ProbeRegions | None:
    if classes is not None:
        return ProbeRegions(images, np.arange(len(images)), classes.class_ids)
    return (regions_of_boxes(images) or None) if images.has_labels else None


def _validation_regions(
    data: DataConfig, splits: tuple[str, str] | None, trained: ImageSet, classes: FolderClasses | None, index_dir: Path
) -> ProbeRegions | None:
    """Return labelled regions of the validation split, with class ids of the training split; None if it has none."""
    if data.annotations is not None or data.images is not None or (trained.format == "folder" and splits is None):
        return None
    data = data.model_copy(update={"split": splits[1] if splits else None, "limit": None})
    try:
        images = open_images(data, purpose="val", index_dir=index_dir)
    except DataError:
        return None  # a missing validation split is no error, since a probe is optional
    if images.split == trained.split:
        return None
    if classes is None:
        return _regions(images, None) if images.categories == trained.categories or not trained.has_labels else None
    found = folder_classes(images.file_names)
    if found is None:
        return None
    # Classes that the training split does not have cannot be tested.
    number_of = {name: number for number, name in enumerate(classes.names)}
    numbers = np.array([number_of.get(name, -1) for name in found.names], dtype=np.int64)[found.class_ids]
    return ProbeRegions(images, np.arange(len(images)), numbers).take(np.flatnonzero(numbers >= 0))
