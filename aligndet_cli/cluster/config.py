"""Settings of `cluster`."""

import os
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.config import StageConfig

_MAX_THREADS = 8  # each holds blocks of some 40 MB


class ClusterConfig(StageConfig):
    """Settings of the stage `cluster`."""

    # Proposals, weights and an imported file are inputs, hashed by content; split and limit are the proposals'.
    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {
        "proposals",
        "import_file",
        "data.split",
        "data.limit",
        "backbone.weights",
        "backbone.frozen_stages",
        "backbone.norm_eval",
        "backbone.drop_path",
    }

    proposals: str | None = Field(None, description="Proposals to use, by name (the newest).")
    import_file: Path | None = Field(None, description="COCO json whose categories become clusters (none).")
    k: int = Field(256, ge=2, description="Number of clusters.")  # paper B.5
    pca_dim: int = Field(256, ge=1, description="Dimensions of the features that the PCA keeps.")  # docs/paper.md §8.2
    backbone: BackboneConfig = BackboneConfig()
    # Ours: the last map, averaged inside the box, is what a classifier's pooled feature is.
    level: Literal["c2", "c3", "c4", "c5"] = Field("c5", description="Feature map that boxes are pooled from.")
    # the detectors' test resolution, mmdetection
    short_side: int = Field(800, ge=32, description="Short side in pixels that images are resized to.")
    long_side: int = Field(1333, ge=32, description="Largest long side in pixels.")
    batch_size: int = Field(16, ge=1, description="Images per forward pass on each process.")
    # Ours: the PCA is fitted on this many rows from all over the data (None: on all). 128 rows per dimension settle
    # the first 256 components; each further million costs 18 minutes of CPU.
    pca_samples: int | None = Field(262_144, ge=1, description="Number of boxes that the PCA is fitted on.")
    # Ours: on minicoco (17,363 proposals, k 256) 20 epochs end 3.2 % above the inertia of full k-means, 5 epochs 4.3 %
    # and 80 epochs 2.7 %.
    kmeans_epochs: int = Field(20, ge=1, description="Passes of k-means over the features.")

    @property
    def num_threads(self) -> int:
        """Threads for passes over independent blocks of rows; the result does not depend on them."""
        threads = self.runtime.num_workers
        return min(len(os.sched_getaffinity(0)) if threads == "auto" else threads, _MAX_THREADS)
