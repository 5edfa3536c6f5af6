"""Mask R-CNN from proposals to mask AP, with polygons missing from some boxes."""

import json
from pathlib import Path

import pytest
import torch

from helpers.commandline import CHAIN, RANDOM, RESOLUTION, aligndet

pytestmark = pytest.mark.e2e

SMALL = (
    *("--detector", "mask-rcnn", "--backbone", "resnet18"),
    *("--set", "detector.neck_channels=32", "--set", "detector.head_convs=1", "--set", "detector.head_features=64"),
    *("--set", "detector.mask_convs=1", "--set", "detector.max_proposals=100"),
    *(*RESOLUTION, "--batch-size", "2"),
)


@pytest.fixture(scope="module")
def data(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy set without the polygons of its first four boxes to train on."""
    root = tmp_path_factory.mktemp("masks") / "data"
    root.mkdir()
    for folder in ("train", "val"):
        (root / folder).symlink_to(toy / folder)
    (root / "annotations").mkdir()
    for file in (toy / "annotations").iterdir():
        content = json.loads(file.read_text())
        for entry in content["annotations"][:4] if "train" in file.name else ():
            entry["segmentation"] = []
        (root / "annotations" / file.name).write_text(json.dumps(content))
    return root


def test_the_whole_chain_with_masks(data: Path, tmp_path: Path) -> None:
    workspace = ("-w", tmp_path / "workspace")
    aligndet("proposals", data, *workspace, *CHAIN["proposals"])
    aligndet("pretrain-box", *workspace, *SMALL, *RANDOM, "--steps", "3")
    folder = tmp_path / "workspace" / "pretrain-box" / "mask-rcnn-resnet18"
    names = {name.partition(".")[0] for name in torch.load(folder / "weights.pt")["state_dict"]}
    assert names == {"backbone", "neck", "rpn", "head", "box_predictor"}

    ran = aligndet(
        "finetune", *workspace, *SMALL, "--steps", "16", "--set", "training.lr=0.02", "--set", "training.log_every=1"
    )
    assert "4 of " in ran.stderr and "boxes have no mask" in ran.stderr
    folder = tmp_path / "workspace" / "finetune" / "mask-rcnn-resnet18"
    report = json.loads((folder / "load_report.json").read_text())
    assert report["matched_share"] == 1.0
    for name in ("mask_head", "mask_predictor", "class_predictor", "box_predictor"):
        assert report["modules"][name]["restarted"] and not report["modules"][name]["missing"], name
    assert report["modules"]["rpn"]["matched"] == 6
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_mask"] for line in lines if "loss_mask" in line]
    assert len(losses) == 16 and sum(losses[-4:]) < sum(losses[:4])

    result = aligndet("evaluate", *workspace, "--json").json()
    metrics = json.loads(next((tmp_path / "workspace" / "evaluate").glob("*/metrics.json")).read_text())
    assert metrics["segm"]["iou_type"] == "segm" and metrics["segm"]["counts"]["ground_truths"] > 0
    assert result["result"]["mask_AP"] == metrics["segm"]["AP"]


def test_labels_without_any_mask_are_refused(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    (root / "train").symlink_to(data / "train")
    content = json.loads((data / "annotations" / "instances_train.json").read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    ran = aligndet("finetune", root, "-w", tmp_path / "workspace", *SMALL, "--init", "scratch", code=3)
    assert "none of the" in ran.error_line() and "--detector faster-rcnn" in ran.error_line()


@pytest.mark.parametrize(
    ("family", "other"), [("mask-rcnn", "faster-rcnn"), ("cascade-mask-rcnn", "cascade-rcnn"), ("htc", "cascade-rcnn")]
)
def test_without_any_mask_the_family_without_masks_is_named(
    family: str, other: str, data: Path, tmp_path: Path
) -> None:
    labels = json.loads((data / "annotations" / "instances_train.json").read_text())
    for entry in labels["annotations"]:
        entry["segmentation"] = []
    file = tmp_path / "instances_train.json"
    file.write_text(json.dumps(labels))
    words = ("--annotations", file, "--images", data / "train", "--init", "scratch", "--dry-run")
    ran = aligndet("finetune", "-w", tmp_path / "workspace", "--detector", family, *words, code=3)
    assert f"{file}: none of the " in ran.error_line() and f"use --detector {other}, or labels" in ran.error_line()
