import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.files import hash_files
from aligndet_cli.pretrain_image.methods import byol, dense_cl, distill, pixpro, simsiam
from helpers.commandline import aligndet, assert_same_results, files_of

SMALL = ("--backbone", "resnet18", "--image-size", "32", "--batch-size", "4", "--steps", "6")
SMALL += ("--set", "training.log_every=1")
DIMS = ("--set", "embedding_dim=16")
SMALL_BYOL = (*DIMS, "--set", "hidden_dim=24")
PLACES = ("--image-size", "64")  # four in the last map
METHODS = {
    "simsiam": DIMS,
    "moco-v2": DIMS,
    "byol": SMALL_BYOL,
    "dense-cl": (*DIMS, *PLACES),
    "pixpro": (*SMALL_BYOL, *PLACES),
    "distill": ("--teacher", "TEACHER"),
    "supervised": (),
}


def run(objects: Path, workspace: Path, method: str, *words: str, code: int = 0):
    name = ("pretrain-image", objects, "-w", workspace, "--method", method)
    own = [teacher_beside(objects) if word == "TEACHER" else word for word in METHODS[method]]
    return aligndet(*name, *SMALL, *own, *words, code=code)


def teacher_beside(objects: Path) -> Path:
    """A file with a network of random weights, which differ from those that a run starts from."""
    file = objects.with_name("teacher.pth")
    if not file.exists():
        torch.manual_seed(7)
        torch.save(resnet18().state_dict(), file)
    return file


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
    both_views = method in ("simsiam", "byol", "pixpro")
    assert weights["bn1.num_batches_tracked"] == (12 if both_views else 6)  # once per view and step


@pytest.mark.parametrize("method", METHODS)
def test_artifact(made: Path, method: str) -> None:
    folder = made / "pretrain-image" / f"{method}-resnet18"
    assert {"metrics.jsonl", "weights.pt", "plots/curves.png", "manifest.json"} <= files_of(folder).keys()
    result = json.loads((folder / "manifest.json").read_text())["result"]
    assert result["steps"] == 6 and result["images"] == 23 and result["verdict"] and result["method"] == method
    assert {"knn", "linear", "knn_at_start", "linear_at_start"} <= result.keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert {"embedding_rank", "embedding_spread"} <= lines[0].keys()


def test_the_manifest_has_the_teacher_and_its_content(made: Path, objects: Path, tmp_path: Path) -> None:
    folder = made / "pretrain-image" / "distill-resnet18"
    manifest = json.loads((folder / "manifest.json").read_text())
    teacher = teacher_beside(objects)
    assert manifest["result"]["teacher"] == "resnet18"
    assert manifest["inputs"]["teacher"] == hash_files([teacher])
    assert json.loads((folder / "config.json").read_text())["teacher"] == str(teacher.absolute())
    assert all("teacher" not in json.loads(file.read_text())["inputs"] for file in made.rglob("byol-*/manifest.json"))
    # The same file in another folder is the same teacher; another content is not.
    copied = Path(shutil.copy(teacher, tmp_path))
    assert run(objects, made, "distill", "--teacher", copied).stdout.startswith("already complete")
    torch.save(resnet18().state_dict(), copied)
    line = run(objects, made, "distill", "--teacher", copied, code=2).error_line()
    assert "input teacher: " in line and "--force" in line


def test_a_run_can_teach_the_next(made: Path, objects: Path, tmp_path: Path) -> None:
    """The file does not say which network it holds; the settings beside it do, or its tensors."""
    weights = made / "pretrain-image" / "supervised-resnet18" / "weights.pt"
    for file in (weights, Path(shutil.copy(weights, tmp_path / "alone.pt"))):
        told = run(objects, tmp_path / "w", "distill", "--teacher", file, "-n", "--json").json()["effective"]
        assert told["teacher"].startswith("resnet18, ") and "momentum" not in told
    told = run(objects, tmp_path / "w", "byol", "-n", "--json").json()["effective"]
    assert told["momentum"] == "0.9, rising to 1" and "queue" not in told


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
    assert f"the newest of {len(METHODS)} runs, supervised-resnet18 (not simsiam-resnet18, moco-v2-" in ran.stderr
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
        (("--set", "temperature=0.3"), 2, "temperature: no effect on --method simsiam"),
        (("--method", "byol", "--set", "optimizer=sgd"), 2, "optimizer: --method byol trains with lars or adamw"),
        (("--method", "distill"), 2, "--method distill: needs a network to learn from; give --teacher FILE or timm:"),
        (("--method", "byol", "--teacher", "x.pth"), 2, "teacher: no effect on --method byol; leave it out"),
        (("--method", "distill", "--teacher", "x.pth"), 4, "/x.pth: no such file"),
        (("--method", "distill", "--teacher", "resnet50"), 2, "--teacher resnet50: neither a file nor timm:NAME"),
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

    monkeypatch.setattr(simsiam, "simsiam_loss", attract)
    words = ("--steps", "40", "--lr", "0.05", "--set", "optimizer=sgd", "--batch-size", "8", "--json")
    result = run(objects, tmp_path / "w", "simsiam", *words).json()["result"]
    assert result["verdict"] == "collapsed", result


def alike(values: torch.Tensor) -> torch.Tensor:
    """The same for all images and places; the gradient is as before."""
    channels = 1 if values.ndim == 4 else values.ndim - 1  # of maps (B, C, H, W), and of (B, P, C) or (B, C)
    others = tuple(place for place in range(values.ndim) if place != channels)
    return values.mean(dim=others, keepdim=True).expand_as(values)


@pytest.mark.parametrize(
    ("module", "name"), [(byol, "embed"), (dense_cl, "places_of"), (pixpro, "places_of"), (distill, "interpolate")]
)
def test_a_backbone_to_which_all_images_look_alike_is_called_collapsed(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *values, **more: alike(original(*values, **more)))
    method = module.__name__.rpartition(".")[2].replace("_", "-")
    result = run(objects, tmp_path / "w", method, "--json").json()["result"]
    assert result["verdict"] == "collapsed", result
