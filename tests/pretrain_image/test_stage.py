import json
import shutil
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.pretrain_image import methods
from helpers.commandline import aligndet, assert_same_results, files_of

SMALL = ("--backbone", "resnet18", "--image-size", "32", "--batch-size", "4", "--steps", "6")
SMALL += ("--set", "training.log_every=1")
DIMS = ("--set", "embedding_dim=16")
METHODS = {"simsiam": DIMS, "moco-v2": DIMS, "supervised": ()}


def run(objects: Path, workspace: Path, method: str, *words: str, code: int = 0):
    name = ("pretrain-image", objects, "-w", workspace, "--method", method)
    return aligndet(*name, *SMALL, *METHODS[method], *words, code=code)


@pytest.fixture(scope="module")
def made(objects: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a run of every method."""
    workspace = tmp_path_factory.mktemp("image") / "w"
    for method in METHODS:
        run(objects, workspace, method)
    return workspace


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_torchvisions(made: Path, method: str) -> None:
    weights = torch.load(made / "pretrain-image" / f"{method}-resnet18" / "weights.pt", weights_only=True)
    if method == "supervised":
        resnet18(num_classes=5).load_state_dict(weights)
    else:
        missing, unexpected = resnet18().load_state_dict(weights, strict=False)
        assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    torch.manual_seed(0)
    start = build_backbone(BackboneConfig(name="resnet18")).state_dict()
    trained = [name for name in start if not name.endswith("num_batches_tracked")]
    assert all(not torch.equal(weights[name], start[name]) for name in trained)
    assert weights["bn1.num_batches_tracked"] == (6 if method != "simsiam" else 12)  # once per view and step


@pytest.mark.parametrize("method", METHODS)
def test_artifact(made: Path, method: str) -> None:
    folder = made / "pretrain-image" / f"{method}-resnet18"
    assert {"metrics.jsonl", "weights.pt", "plots/curves.png", "manifest.json"} <= files_of(folder).keys()
    result = json.loads((folder / "manifest.json").read_text())["result"]
    assert result["steps"] == 6 and result["images"] == 23 and result["verdict"]
    assert {"knn", "linear", "knn_at_start", "linear_at_start"} <= result.keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert {"embedding_rank", "embedding_spread"} <= lines[0].keys()


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_again_and_with_loader_processes(made: Path, objects: Path, method: str, tmp_path: Path) -> None:
    run(objects, tmp_path / "w", method, "--num-workers", "1")
    run_folder = Path("pretrain-image", f"{method}-resnet18")
    assert_same_results(tmp_path / "w" / run_folder, made / run_folder)


def test_already_complete_and_refused(made: Path, objects: Path) -> None:
    before = files_of(made)
    assert run(objects, made, "moco-v2").stdout.startswith("already complete")
    assert "momentum: None -> 0.5" in run(objects, made, "moco-v2", "--set", "momentum=0.5", code=2).error_line()
    assert files_of(made) == before
    assert not (made / "workspace.json").exists()  # these are not the images of the detector


def test_auto_is_the_batch_size_that_the_run_began_with(made: Path, objects: Path) -> None:
    # A new run would take 2: 256, halved until eight of them are no more than the 23 images.
    small = ("--backbone", "resnet18", "--image-size", "32", "--steps", "6", *DIMS, "--set", "training.log_every=1")
    words = ("pretrain-image", objects, "-w", made, "--method", "simsiam", *small)
    assert aligndet(*words).stdout.startswith("already complete")  # 4, as it was given


def test_later_stages_start_from_the_newest_backbone(made: Path, toy: Path, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(made, tmp_path / "w"))
    aligndet("proposals", toy, "-w", workspace, "--source", "ground-truth", "--num-workers", "1")
    detector = ("--detector", "retinanet", "--backbone", "resnet18", "--steps", "2", "--batch-size", "2")
    small = (*detector, "--short-side", "64", "--long-side", "96", "--set", "detector.neck_channels=16")
    words = ("pretrain-box", "-w", workspace, *small)
    ran = aligndet(*words)
    assert "weights pretrain-image/supervised-resnet18" in ran.stderr
    assert "the newest of 3 runs, supervised-resnet18 (not simsiam-resnet18, moco-v2-resnet18)" in ran.stderr
    weights = torch.load(workspace / "pretrain-box" / "retinanet-resnet18" / "weights.pt", weights_only=True)
    mine = torch.load(workspace / "pretrain-image" / "supervised-resnet18" / "weights.pt", weights_only=True)
    assert torch.equal(weights["state_dict"]["backbone.layer4.1.conv2.weight"], mine["layer4.1.conv2.weight"])
    assert aligndet(*words, "--backbone-weights", "workspace").stdout.startswith("already complete")
    line = aligndet(*words, "--backbone-weights", "none", code=2).error_line()
    assert "input backbone weights: " in line and "-> none" in line
    # Plain fine-tuning is the control of the run: the same backbone, although a newer one is there now.
    aligndet("pretrain-image", toy, "-w", workspace, *SMALL, *DIMS, "--name", "newer")
    effective = aligndet("finetune", "-w", workspace, *small, "--init", "backbone", "-n", "--json").json()["effective"]
    assert effective["weights"] == "backbone only, pretrain-image/supervised-resnet18"
    effective = aligndet(
        "cluster", "-w", workspace, "--k", "2", "--pca-dim", "2", "--backbone", "resnet18", "-n", "--json"
    )
    assert "weights pretrain-image/newer" in effective.json()["effective"]["backbone"]
    rows = aligndet("status", "-w", workspace, "--json").json()["runs"]
    (row,) = [row for row in rows if row["stage"] == "pretrain-box"]
    assert row["state"] == "complete" and "pretrain-image/supervised-resnet18" in row["made_from"]
    # Gone, the backbone makes what was made from it stale.
    shutil.rmtree(workspace / "pretrain-image" / "supervised-resnet18")
    rows = aligndet("status", "-w", workspace, "--json").json()["runs"]
    (row,) = [row for row in rows if row["stage"] == "pretrain-box"]
    assert row["state"] == "stale" and row["remark"] == "backbone weights changed or gone since"
    line = aligndet("finetune", "-w", workspace, *small, "--init", "backbone", "-n", code=2).error_line()
    assert "no longer in the workspace" in line


def test_asked_for_weights_that_nobody_made(made: Path, toy: Path, tmp_path: Path) -> None:
    aligndet("proposals", toy, "-w", tmp_path, "--source", "ground-truth", "--num-workers", "1")
    words = ("pretrain-box", "-w", tmp_path, "--backbone", "resnet18", "-n")
    line = aligndet(*words, "--backbone-weights", "workspace", code=4).error_line()
    assert "no finished run of resnet18; run `aligndet pretrain-image DATA --backbone resnet18` first" in line
    line = aligndet(*words, code=4).error_line()
    assert "needs trained weights: give --backbone-weights DEFAULT" in line and "none means random ones" in line
    ran = aligndet(*words, "--backbone-weights", "none", "--json")
    assert "weights none (random)" in ran.json()["effective"]["detector"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--method", "supervised"), 3, "needs images in one folder per class"),
        (("--method", "simclr"), 2, "method: 'simclr' is not a choice (from --method)"),
        (("--set", "queue_size=5"), 2, "queue_size: no effect on --method simsiam"),
        (("--image-size", "8"), 2, "image_size: should be greater than or equal to 32"),
        (("--batch-size", "3", "--accumulate", "2"), 2, "--batch-size 3: must be a multiple of"),
    ],
)
def test_mistakes_are_one_line(toy: Path, tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    line = aligndet(
        "pretrain-image", toy, "-w", tmp_path / "w", "--backbone", "resnet18", *words, code=code
    ).error_line()
    assert said in line
    assert not (tmp_path / "w").exists()


def test_a_collapsed_run_is_called_collapsed(objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the stop-gradient and the predictor the same embedding for all images is the best there is."""

    def attract(_p2: torch.Tensor, second: torch.Tensor, _p1: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.cosine_similarity(first, second).mean() + 0 * (_p1.sum() + _p2.sum())

    monkeypatch.setattr(methods, "simsiam_loss", attract)
    words = ("--steps", "40", "--lr", "0.05", "--set", "optimizer=sgd", "--batch-size", "8", "--json")
    result = run(objects, tmp_path / "w", "simsiam", *words).json()["result"]
    assert result["verdict"] == "collapsed", result
