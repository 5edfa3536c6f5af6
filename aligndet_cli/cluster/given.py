"""Clusters from a file: the categories of its boxes become the cluster labels of the proposals."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.artifacts.exchange import classed_boxes_from_coco
from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.data.dataset import Category, ImageSet, positions_of
from aligndet_cli.errors import DataError


@dataclass(frozen=True)
class GivenClusters:
    """Cluster labels from a file, for M proposals and k clusters.

    Attributes:
        labels: (M,) int32 cluster id of each proposal: the position of its category in `categories`.
        categories: the k categories of the file, by id; some may have no proposals.
        num_unused: number of boxes in the file that are on images of the data but are no proposals.
    """

    labels: NDArray[np.int32]
    categories: tuple[Category, ...]
    num_unused: int


def clusters_from_coco(file: Path, store: ProposalStore, images: ImageSet) -> GivenClusters:
    """Return the category of the box in the file that equals each proposal.

    As in `proposals --import`, images are matched and boxes are cut at the border of the image. If a box occurs
    several times, the first proposal gets the category of its first occurrence, and so on.

    Args:
        file: COCO json whose categories are clusters.
        images: the data of the proposals.

    Raises:
        DataError: the file cannot be read, has fewer than two categories, or lacks the box of a proposal.

    Source: the authors' clustered proposals, with categories `cluster_1` to `cluster_256`.
    """
    given, category_ids, categories = classed_boxes_from_coco(file, images)
    if len(categories) < 2:
        names = ", ".join(category.name for category in categories)
        raise DataError(
            f"{file}: one category ({names}) makes no clusters; name the file whose categories are the clusters, "
            "or leave --import out to make some"
        )
    cluster_ids = positions_of(category_ids, np.array([category.category_id for category in categories]))
    labels = np.full(store.total, -1, dtype=np.int32)
    positions = positions_of(store.image_ids, images.image_ids)
    for index, (entry, position) in enumerate(zip(store.images(), positions.tolist(), strict=True)):
        start, stop = given.offsets[position], given.offsets[position + 1]
        limits = np.array([entry.size_hw[1], entry.size_hw[0]] * 2, dtype=np.float32)
        boxes = np.clip(given.boxes[start:stop], 0, limits)
        rows = slice(store.offsets[index], store.offsets[index + 1])
        labels[rows] = _labels_by_box(store.boxes_of(index), boxes, cluster_ids[start:stop])
    _require_all(file, labels, store)
    return GivenClusters(labels, categories, len(given.boxes) - store.total)


def _labels_by_box(
    wanted: NDArray[np.float32], boxes: NDArray[np.float32], cluster_ids: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the (N,) cluster ids of `wanted` (N, 4) among `boxes` (L, 4) with ids (L,); -1 if there is no such box."""
    if np.array_equal(wanted, boxes[: len(wanted)]):
        return cluster_ids[: len(wanted)]
    waiting: dict[Sequence[float], list[int]] = defaultdict(list)
    for box, cluster_id in zip(boxes[::-1].tolist(), cluster_ids[::-1].tolist(), strict=True):
        waiting[tuple(box)].append(cluster_id)
    found = [waiting.get(tuple(box), []) for box in wanted.tolist()]
    return np.array([ids.pop() if ids else -1 for ids in found], dtype=np.int64)


def _require_all(file: Path, labels: NDArray[np.int32], store: ProposalStore) -> None:
    missing = np.flatnonzero(labels < 0)
    if not len(missing):
        return
    index = int(np.searchsorted(store.offsets, missing[0], side="right")) - 1
    name = next(entry.file_name for number, entry in enumerate(store.images()) if number == index)
    raise DataError(
        f"{file}: has no such box for {len(missing):,} of the {store.total:,} proposals in {store.folder}, first "
        f"{store.boxes[missing[0]].tolist()} of image {name}; take both from one file: "
        f"`aligndet proposals --import {file}` (with --force, or a --name), then this again"
    )
