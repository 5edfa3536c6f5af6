"""Pre-training of a detector that trains on clusters."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from aligndet_cli.pretrain_box.stage import PretrainBoxConfig, prepare
from aligndet_cli.workspace import Workspace
from helpers.commandline import BACKBONE, RANDOM, RESOLUTION, aligndet

DETR = ("--detector", "detr", *BACKBONE, *RANDOM)
SMALL = (
    *("--set", "detector.hidden_dim=32", "--set", "detector.num_heads=4", "--set", "detector.encoder_layers=1"),
    *("--set", "detector.decoder_layers=2", "--set", "detector.feedforward_dim=48"),
)
SHORT = (*RESOLUTION, "--steps", "3", "--batch-size", "2")


@pytest.fixture
def workspace(chain: Path, tmp_path: Path) -> Path:
    """Proposals and clusters, to be changed at will."""
    for stage in ("proposals", "cluster"):
        shutil.copytree(chain / stage, tmp_path / "w" / stage)
    shutil.copy(chain / "workspace.json", tmp_path / "w")
    return tmp_path / "w"


def config_of(**settings: object) -> PretrainBoxConfig:
    return PretrainBoxConfig.model_validate(
        {"detector": {"family": "detr"}, "backbone": {"weights": "none"}, **settings}
    )


def test_boxes_come_with_the_clusters_of_their_rows(workspace: Path) -> None:
    plan = prepare(config_of(topk=3), Workspace(workspace))
    store = plan.boxes.store
    labels = np.load(workspace / "cluster" / "train-k4" / "labels.npy")
    assert plan.boxes.num_classes == 4
    for index in plan.indices:
        row = int(plan.boxes.rows[index])
        boxes, clusters = plan.boxes.boxes_and_classes(index)
        start = int(store.offsets[row])
        assert len(boxes) == min(3, store.counts[row]) and clusters.dtype == np.int64
        assert np.array_equal(boxes, store.boxes[start : start + len(boxes)])
        assert clusters.tolist() == labels[start : start + len(boxes)].tolist()
    # what goes to the loaders' processes is the place of the labels, not a copy of them
    assert len(pickle.dumps(plan.boxes.clusters)) < 500
    assert pickle.loads(pickle.dumps(plan.boxes)).boxes_and_classes(0)[1].tolist() == (
        plan.boxes.boxes_and_classes(0)[1].tolist()
    )


def test_topk_is_the_recipes_unless_given(workspace: Path) -> None:
    assert prepare(config_of(), Workspace(workspace)).boxes.topk == 50
    assert prepare(config_of(topk=7), Workspace(workspace)).boxes.topk == 7
    retinanet = prepare(config_of(detector={}), Workspace(workspace))
    assert retinanet.boxes.topk == 50 and retinanet.boxes.clusters is None and retinanet.boxes.num_classes == 1
    assert "best 50 (detr recipe)" in aligndet("pretrain-box", "-w", workspace, *DETR, "--dry-run").stderr


def test_no_clusters(workspace: Path) -> None:
    shutil.rmtree(workspace / "cluster")
    line = aligndet("pretrain-box", "-w", workspace, *DETR, code=2).error_line()
    assert "no clusters of the proposals train, and detr trains on them: run `aligndet cluster` first" in line


def test_clusters_of_other_proposals_do_not_count(workspace: Path) -> None:
    manifest = workspace / "cluster" / "train-k4" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["inputs"]["proposals"] = "0000"
    manifest.write_text(json.dumps(content))
    assert "run `aligndet cluster` first" in aligndet("pretrain-box", "-w", workspace, *DETR, code=2).error_line()


def test_clusters_by_name(workspace: Path) -> None:
    named = ("--set", "clusters=train-k4", "--dry-run")
    assert "cluster/train-k4, 4 of them" in aligndet("pretrain-box", "-w", workspace, *DETR, *named).stderr
    other = aligndet("pretrain-box", "-w", workspace, *DETR, "--set", "clusters=nope", code=2).error_line()
    assert "cluster/nope: no clusters of the proposals train (there are: train-k4)" in other
    idle = aligndet("pretrain-box", "-w", workspace, "--detector", "retinanet", *named, code=2).error_line()
    assert "clusters = train-k4: no effect, retinanet does not train on clusters" in idle


def test_other_clusters_are_another_run(workspace: Path) -> None:
    aligndet("pretrain-box", "-w", workspace, *DETR, *SMALL, *SHORT)
    aligndet("cluster", "-w", workspace, "--k", "3", "--pca-dim", "4", *BACKBONE, *RANDOM, *RESOLUTION)
    line = aligndet("pretrain-box", "-w", workspace, *DETR, *SMALL, *SHORT, code=2).error_line()
    assert "input clusters: " in line and "--force" in line
    assert (
        "already complete"
        in aligndet("pretrain-box", "-w", workspace, *DETR, *SMALL, *SHORT, "--set", "clusters=train-k4").stdout
    )
    shutil.rmtree(workspace / "cluster")
    rows = {row["run"]: row for row in aligndet("status", "-w", workspace, "--json").json()["runs"]}
    assert (rows["detr-resnet18"]["state"], rows["detr-resnet18"]["remark"]) == (
        "stale",
        "clusters changed or gone since",
    )


def test_detr_through_all_commands(workspace: Path) -> None:
    aligndet("pretrain-box", "-w", workspace, *DETR, *SMALL, *SHORT)
    weights = torch.load(workspace / "pretrain-box" / "detr-resnet18" / "weights.pt", weights_only=True)
    assert not any(name.startswith("class_predictor") for name in weights["state_dict"])
    aligndet("finetune", "-w", workspace, "--detector", "detr", *SHORT)
    report = json.loads((workspace / "finetune" / "detr-resnet18" / "load_report.json").read_text())
    restarted = [name for module in report["modules"].values() for name in module["restarted"]]
    assert restarted == ["class_predictor.weight", "class_predictor.bias"] and report["matched_share"] == 1.0
    assert set(report["modules"]) == {
        "backbone",
        "neck",
        "transformer",
        "query_embedding",
        "class_predictor",
        "box_tower",
        "box_predictor",
    }
    result = aligndet("evaluate", "-w", workspace, "--json").json()["result"]
    assert result["predictions"] == 100 * result["images"] > 0  # every query of every image
