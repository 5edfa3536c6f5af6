import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from aligndet_cli.cluster import stage
from aligndet_cli.cluster.config import ClusterConfig
from aligndet_cli.config import DataConfig
from aligndet_cli.processes.devices import Process
from aligndet_cli.proposals import stage as proposals_stage
from aligndet_cli.workspace import Workspace

# Boxes per image: distinct numbers, with images without any at the start, in the middle and at the end.
NUM_BOXES = (0, 3, 7, 0, 0, 2, 5, 1, 0)


def draw_root(root: Path) -> Path:
    """A COCO root of images of different sizes with coloured rectangles, labelled; ids 11, 18, 25, ..."""
    generator = np.random.default_rng(5)
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, num_boxes in enumerate(NUM_BOXES):
        height, width = 71 + 4 * index, 97 - 3 * index
        pixels = generator.integers(90, 110, (height, width, 3), dtype=np.uint8)
        images.append({"id": 11 + 7 * index, "file_name": f"{index}.png", "height": height, "width": width})
        for _ in range(num_boxes):
            x, y = int(generator.integers(0, width - 41)), int(generator.integers(0, height - 37))
            pixels[y : y + 37, x : x + 41] = generator.integers(0, 256, 3)
            annotation = {"image_id": 11 + 7 * index, "category_id": 3, "area": 41.0 * 37, "iscrowd": 0}
            annotations.append({**annotation, "id": len(annotations) + 1, "bbox": [x, y, 41, 37], "segmentation": []})
        cv2.imwrite(str(root / "train2017" / f"{index}.png"), pixels)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "thing"}]}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_root(tmp_path_factory.mktemp("cluster-data") / "coco")


def make_proposals(folder: Path, data_root: Path) -> Workspace:
    """A workspace that holds the labelled boxes as proposals."""
    workspace = Workspace(folder)
    config = proposals_stage.ProposalsConfig.model_validate(
        {"data": DataConfig(root=data_root), "source": "ground-truth", "runtime": {"num_workers": 1}}
    )
    plan = proposals_stage.prepare(config, workspace)
    with plan.output.lock():
        proposals_stage.run(plan, Process())
    return workspace


@pytest.fixture(scope="session")
def workspace_with_proposals(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    return make_proposals(tmp_path_factory.mktemp("cluster-workspace") / "ws", root).root


@pytest.fixture
def make_workspace(tmp_path: Path, workspace_with_proposals: Path) -> Callable[..., Workspace]:
    """Builds a workspace with proposals, those of `root` unless said otherwise."""

    def make(name: str = "ws", data_root: Path | None = None) -> Workspace:
        if data_root is not None:
            return make_proposals(tmp_path / name, data_root)
        return Workspace(Path(shutil.copytree(workspace_with_proposals, tmp_path / name)))

    return make


@pytest.fixture
def config() -> ClusterConfig:
    return small_config()


def small_config(**settings: Any) -> ClusterConfig:
    """Small settings, overridden by `settings`."""
    small = {
        "k": 5,
        "pca_dim": 4,
        "backbone": {"name": "resnet18", "weights": "none"},
        "short_side": 64,
        "long_side": 96,
        "batch_size": 2,
        "kmeans_epochs": 2,
        "runtime": {"num_workers": 0},
    }
    return ClusterConfig.model_validate({**small, **settings})


@pytest.fixture
def run_stage() -> Callable[..., Path]:
    """Runs the stage in this process and returns the artifact's folder."""

    def run(config: ClusterConfig, workspace: Workspace, **options: bool) -> Path:
        plan = stage.prepare(config, workspace, **options)
        with plan.output.lock():
            stage.run(plan, Process())
        return plan.output.folder

    return run


@pytest.fixture
def make_config() -> Callable[..., ClusterConfig]:
    return small_config


@pytest.fixture
def contents_of() -> Callable[[Path], dict[str, bytes]]:
    """Bytes of every file of an artifact but its manifest, which holds times."""

    def contents(folder: Path) -> dict[str, bytes]:
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    return contents
