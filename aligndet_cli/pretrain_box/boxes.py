"""Proposals as boxes to train a detector on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.artifacts.clusters import ClusterLabels
from aligndet_cli.artifacts.open import open_proposals
from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet, positions_of
from aligndet_cli.data.sample import mix_seed
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.workspace import Artifact, Workspace


@dataclass(frozen=True)
class ProposalBoxes:
    """Proposals as the boxes of images, in classes by cluster or all in one class, "object"; see `BoxSource`."""

    store: ProposalStore
    rows: NDArray[np.int64]  # see `ProposalData`
    topk: int
    clusters: ClusterLabels | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes of the detector: clusters, or 1, whose predictor is not trained."""
        return 1 if self.clusters is None else self.clusters.num_clusters

    def counts(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Return (N,) int64 numbers of proposals, at most `topk`, of the images at N indices of the set."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        found = np.where(rows >= 0, self.store.counts[rows], 0)
        return np.minimum(found, self.topk)

    def boxes_and_classes(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the best `topk` proposals of an image: (N, 4) xyxy and class ids (N,)."""
        row = int(self.rows[index])
        boxes = self.store.boxes_of(row)[: self.topk]
        if self.clusters is None:
            return boxes, np.zeros(len(boxes), dtype=np.int64)
        start = int(self.store.offsets[row])
        return boxes, self.clusters.of_rows(start, start + len(boxes))


@dataclass(frozen=True)
class ProposalData:
    """Proposals, and images that have some.

    Attributes:
        rows: (images,) int64 position of each image in the store; -1 for images that `proposals` could not read.
        indices: indices of images with proposals, up to the limit.
    """

    store: ProposalStore
    image_set: ImageSet
    artifact: Artifact
    rows: NDArray[np.int64]
    indices: list[int]


def open_proposal_data(workspace: Workspace, name: str | None, data: DataConfig) -> ProposalData:
    """Open the proposals to train on, see `open_proposals`, and their first `data.limit` images with any.

    Raises:
        ConfigError: no such proposals, or not of this data.
        DataError: none of the images has a proposal.
    """
    unlimited = DataConfig.model_validate({**data.model_dump(), "limit": None})
    store, image_set, artifact = open_proposals(workspace, name, unlimited)
    rows = positions_of(image_set.image_ids, store.image_ids)
    has_boxes = (rows >= 0) & (store.counts[rows] > 0)
    indices = [int(index) for index in has_boxes[: data.limit].nonzero()[0]]
    if not indices:
        raise DataError(
            f"{artifact.folder}: none of the images has a proposal: "
            "run `aligndet proposals --force --min-size N` with a smaller N"
        )
    return ProposalData(store, image_set, artifact, rows, indices)


def draw_images(indices: list[int], boxes: ProposalBoxes, num_boxes: int, seed: int) -> list[int]:
    """Draw random images until they have `num_boxes` proposals; return their sorted indices.

    Source: table 8 of the paper, where an object-centric set has as many objects as a multi-object set.

    Raises:
        ConfigError: there are fewer proposals.
    """
    counts = boxes.counts(indices)
    if counts.sum() < num_boxes:
        raise ConfigError(
            f"--limit-boxes {num_boxes}: the {len(indices)} images have only {counts.sum()} proposals; "
            "leave it out, or make more proposals"
        )
    order = np.random.default_rng(mix_seed(seed, len(indices))).permutation(len(indices))
    num_images = int(np.searchsorted(np.cumsum(counts[order]), num_boxes)) + 1
    return sorted(indices[position] for position in order[:num_images])
