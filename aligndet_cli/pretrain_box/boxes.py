"""Proposals as what a detector is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.cluster.labels import ClusterLabels
from aligndet_cli.data.transforms import mix_seed
from aligndet_cli.errors import ConfigError
from aligndet_cli.proposals.store import ProposalStore


@dataclass(frozen=True)
class ProposalBoxes:
    """Proposals as the boxes of an image, classed by cluster or all of the one class "object"; see `BoxSource`."""

    store: ProposalStore
    rows: NDArray[np.int64]  # (images,) row of each image of the set in the store
    topk: int | None
    clusters: ClusterLabels | None = None

    @property
    def num_classes(self) -> int:
        """Classes of the detector: the clusters, or one, "object", whose predictor is not trained."""
        return 1 if self.clusters is None else self.clusters.num_clusters

    def counts(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """How many proposals each of these images has, at most `topk`."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        found = np.where(rows >= 0, self.store.counts[rows], 0)
        return found if self.topk is None else np.minimum(found, self.topk)

    def boxes_and_classes(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The best `topk` proposals of an image."""
        row = int(self.rows[index])
        boxes = self.store.boxes_of(row)[: self.topk]
        if self.clusters is None:
            return boxes, np.zeros(len(boxes), dtype=np.int64)
        start = int(self.store.offsets[row])
        return boxes, self.clusters.of_rows(start, start + len(boxes))


def draw_images(indices: list[int], boxes: ProposalBoxes, num_boxes: int, seed: int) -> list[int]:
    """Images in random order until they have so many proposals, to match another set's number; sorted again.

    Source: table 8 of the paper, where an object-centric set has as many objects as the multi-object one.

    Raises:
        ConfigError: there are fewer.
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
