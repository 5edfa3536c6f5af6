"""Probes of a backbone's features: accuracy of nearest neighbours and of a linear classifier."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.loaders import load_image
from aligndet_cli.data.transforms import normalise
from aligndet_cli.errors import DataError
from aligndet_cli.logs import logger
from aligndet_cli.pretrain_image.method import embed

NEIGHBOURS = 20  # at most, and no more than regions per class; Wu et al., CVPR 2018, use 200 on ImageNet
_CENTRE = 0.875  # side of the crop by short side of the image, as in tests on ImageNet (224 of 256)
_BATCH = 64
_MIN_BOX_SIDE = 8.0


@dataclass(frozen=True)
class ProbeRegions:
    """N labelled regions of images, for a probe.

    Attributes:
        image_index: (N,) int64, position in the image set, ascending.
        class_ids: (N,) int64.
        boxes: (N, 4) float32 xyxy; None for whole images.
    """

    image_set: ImageSet
    image_index: NDArray[np.int64]
    class_ids: NDArray[np.int64]
    boxes: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.class_ids)

    def take(self, rows: NDArray[np.int64]) -> "ProbeRegions":
        """Return the regions in (M,) rows."""
        boxes = None if self.boxes is None else self.boxes[rows]
        return replace(self, image_index=self.image_index[rows], class_ids=self.class_ids[rows], boxes=boxes)

    def limited(self, count: int) -> "ProbeRegions":
        """Return at most `count` regions, evenly spread."""
        if len(self) <= count:
            return self
        return self.take(np.linspace(0, len(self) - 1, count).round().astype(np.int64))

    def split(self, share: float, seed: int) -> "tuple[ProbeRegions, ProbeRegions]":
        """Return two parts without a common image, the second with about `share` of the images."""
        images = np.unique(self.image_index)
        order = np.random.default_rng(seed).permutation(images)
        is_second = np.isin(self.image_index, order[: max(round(share * len(images)), 1)])
        return self.take(np.flatnonzero(~is_second)), self.take(np.flatnonzero(is_second))


@dataclass(frozen=True)
class Probe:
    """Regions to learn from, and others to be tested on."""

    train: ProbeRegions
    test: ProbeRegions


def regions_of_boxes(image_set: ImageSet) -> ProbeRegions:
    """Return the labelled boxes of a split, without crowds and boxes with a side below 8 pixels."""
    image_index = np.repeat(np.arange(len(image_set)), np.diff(image_set.offsets))
    sides = image_set.boxes[:, 2:] - image_set.boxes[:, :2]
    kept = np.flatnonzero(~image_set.is_crowd & (sides >= _MIN_BOX_SIDE).all(axis=1))
    return ProbeRegions(image_set, image_index[kept], image_set.class_ids[kept], image_set.boxes[kept])


def score(backbone: Backbone, probe: Probe, side: int) -> dict[str, float]:
    """Return the `knn` and `linear` accuracy, 0..1, of the features of a backbone, which is put in eval mode.

    Cosine neighbours vote by class; the linear classifier is a logistic regression on standardised features.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_x, train_y = extract(backbone, probe.train, side)
    test_x, test_y = extract(backbone, probe.test, side)
    num_neighbours = min(NEIGHBOURS, max(len(train_y) // len(np.unique(train_y)), 1))
    neighbours = KNeighborsClassifier(num_neighbours, metric="cosine", algorithm="brute")
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    with warnings.catch_warnings(action="ignore"):  # no convergence: an accuracy near the optimum is enough
        linear.fit(train_x, train_y)
        scores = {"knn": neighbours.fit(train_x, train_y).score(test_x, test_y), "linear": linear.score(test_x, test_y)}
    return {name: round(float(value), 4) for name, value in scores.items()}


@torch.inference_mode()
def extract(backbone: Backbone, regions: ProbeRegions, side: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return pooled features (N, C) and class ids (N,) of the regions; images that cannot be read are left out.

    Raises:
        DataError: no image can be read.
    """
    backbone.eval()
    device = next(backbone.parameters()).device
    features, rows = [], []
    skipped: list[DataError] = []
    crops = _crops(regions, side, skipped)
    while batch := list(islice(crops, _BATCH)):
        pixels = torch.stack([normalise(crop) for _, crop in batch]).to(device, memory_format=torch.channels_last)
        features.append(embed(backbone, pixels).float().cpu().numpy())
        rows += [row for row, _ in batch]
    if not rows:
        folder = regions.image_set.images_dir
        raise DataError(f"{folder}: none of the {len(skipped)} images can be read; the first: {skipped[0]}")
    return np.concatenate(features), regions.class_ids[rows]


def _crops(regions: ProbeRegions, side: int, skipped: list[DataError]) -> Iterator[tuple[int, Tensor]]:
    """Yield row and (3, side, side) uint8 crop of every region whose image can be read; add errors to `skipped`."""
    image, loaded = None, -1
    for row, index in enumerate(regions.image_index.tolist()):
        if index != loaded:
            loaded = index
            try:
                image = load_image(regions.image_set, index)
            except DataError as error:
                logger.debug(f"probe: {error}")
                skipped.append(error)
                image = None
        if image is not None:
            box = None if regions.boxes is None else regions.boxes[row]
            yield row, F.resized_crop(image, *square_of((image.shape[1], image.shape[2]), box), [side, side])


def square_of(size_hw: tuple[int, int], box: NDArray[np.float32] | None) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the square around a (4,) xyxy box, cut at the border, or of the centre."""
    height, width = size_hw
    if box is None:
        length = max(round(_CENTRE * min(height, width)), 1)
        return (height - length) // 2, (width - length) // 2, length, length
    centre_x, centre_y = float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2
    half = float(max(box[2] - box[0], box[3] - box[1])) / 2
    left, top = max(int(centre_x - half), 0), max(int(centre_y - half), 0)
    right, bottom = min(round(centre_x + half), width), min(round(centre_y + half), height)
    return top, left, max(bottom - top, 1), max(right - left, 1)
