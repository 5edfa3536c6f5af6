"""HTC with a semantic branch: trained after pre-training without one, evaluated, and refused where it cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.commandline import CHAIN, RANDOM, RESOLUTION, aligndet

pytestmark = pytest.mark.e2e

SMALL = (
    *("--detector", "htc", "--backbone", "resnet18"),
    *("--set", "detector.neck_channels=32", "--set", "detector.head_convs=1", "--set", "detector.head_features=64"),
    *("--set", "detector.mask_convs=1", "--set", "detector.max_proposals=50"),
    *("--set", "detector.train_max_proposals=50", "--set", "detector.roi_samples=32"),
    *(*RESOLUTION, "--batch-size", "2"),
)
BRANCH = ("--set", "detector.semantic_classes=3")


@pytest.fixture(scope="module")
def maps(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class 1 in the boxes of the toy set, 0 around them, and none at the top."""
    folder = tmp_path_factory.mktemp("pixel-maps")
    content = json.loads((toy / "annotations" / "instances_train.json").read_text())
    for image in content["images"]:
        classes = np.zeros((image["height"], image["width"]), np.uint8)
        for entry in content["annotations"]:
            if entry["image_id"] == image["id"]:
                x, y, width, height = map(round, entry["bbox"])
                classes[y : y + height, x : x + width] = 1
        classes[:4] = 255
        Image.fromarray(classes).save(folder / f"{Path(image['file_name']).stem}.png")
    return folder


def test_from_pretraining_to_masks(toy: Path, maps: Path, tmp_path: Path) -> None:
    workspace = ("-w", tmp_path / "workspace")
    aligndet("proposals", toy, *workspace, *CHAIN["proposals"])
    line = aligndet("pretrain-box", *workspace, *SMALL, *RANDOM, *BRANCH, "--dry-run", code=2).error_line()
    assert line.endswith("pre-training has no classes of pixels; leave it out here, and give it to finetune")
    aligndet("pretrain-box", *workspace, *SMALL, *RANDOM, "--steps", "2")
    line = aligndet("finetune", *workspace, *SMALL, *BRANCH, "--dry-run", code=2).error_line()
    assert "give the folder of its maps by --set pixel_maps=FOLDER" in line
    of_maps = ("--set", f"pixel_maps={maps}")
    line = aligndet("finetune", *workspace, *SMALL, *of_maps, "--dry-run", code=2).error_line()
    assert "pixel_maps: no effect without a semantic branch" in line
    nowhere = ("--set", f"pixel_maps={maps / 'none'}")
    line = aligndet("finetune", *workspace, *SMALL, *BRANCH, *nowhere, "--dry-run", code=3).error_line()
    assert "none: no such folder of maps" in line

    words = ("finetune", *workspace, *SMALL, *BRANCH, *of_maps, "--steps", "12", "--set", "training.lr=0.01")
    ran = aligndet(*words, "--set", "training.log_every=1")
    assert f"3 classes of pixels, {maps}" in ran.stderr
    folder = tmp_path / "workspace" / "finetune" / "htc-resnet18"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_semantic"] for line in lines if "loss_semantic" in line]
    assert len(losses) == 12 and sum(losses[-4:]) < 0.8 * sum(losses[:4])
    report = json.loads((folder / "load_report.json").read_text())["modules"]
    names = {n for n in torch.load(folder / "weights.pt")["state_dict"] if n.startswith("semantic_head.")}
    assert set(report["semantic_head"]["restarted"]) == names and len(names) == 2 * (5 + 4 + 2)
    assert aligndet(*words, "--set", "training.log_every=1").stdout.startswith("already complete")

    result = aligndet("evaluate", *workspace, "--json").json()["result"]
    assert "mask_AP" in result
    # A detector that has the branch keeps it, or loses it where one says so.
    init = ("--init", str(folder / "weights.pt"), "--steps", "1", "--name", "again")
    line = aligndet("finetune", *workspace, *SMALL, *init, "--dry-run", code=2).error_line()
    assert "detector.semantic_classes = 3: trains on the class of every pixel" in line
    aligndet("finetune", *workspace, *SMALL, *init, "--set", "detector.semantic_classes=0")
    report = json.loads((folder.parent / "again" / "load_report.json").read_text())["modules"]
    assert set(report["semantic_head"]["unexpected"]) == names and not report["semantic_head"]["restarted"]


def test_bench_of_pretraining_has_no_classes_of_pixels() -> None:
    line = aligndet("bench", "--stage", "pretrain-box", *SMALL[:4], *BRANCH, code=2).error_line()
    assert line.endswith("pre-training has no classes of pixels; leave it out, or use --stage finetune")
