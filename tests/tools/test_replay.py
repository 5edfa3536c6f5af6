"""A run that diverged leaves the state before the bad step, and `replay` finds the first value that is not finite."""

import json
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet_cli.data.sample import Sample
from aligndet_cli.detectors.retinanet import RetinaNet
from aligndet_cli.training.checkpoint import load_checkpoint
from aligndet_cli.training.dump import read_dump
from helpers.commandline import CHAIN, aligndet, files_of

EVERY_STEP = ("--set", "training.checkpoint.every_steps=1")
IMAGE = ("--method", "moco-v2", "--backbone", "resnet18", "--image-size", "32", "--batch-size", "4", "--steps", "12")
# Rates at which the first steps are finite and the weights after them far too large.
DIVERGING: dict[str, tuple[str, ...]] = {
    "pretrain-image": (*IMAGE, "--lr", "1e30"),
    "pretrain-box": (*CHAIN["pretrain-box"], "--batch-size", "4", "--accumulate", "2", "--lr", "1e12"),
    "finetune": (*CHAIN["finetune"], "--batch-size", "4", "--accumulate", "2", "--lr", "1e12"),
}


def diverge(stage: str, workspace: Path, toy: Path, *words: str) -> tuple[Path, str]:
    """Run a stage until it diverges; return its folder and the error."""
    data = (toy,) if stage == "pretrain-image" else ()
    ran = aligndet(stage, *data, "-w", workspace, *DIVERGING[stage], *words, "--name", "bad", code=1)
    return workspace / stage / ".bad.partial", ran.error_line()


@pytest.fixture
def workspace(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain, tmp_path / "workspace"))


@pytest.fixture
def names(toy: Path) -> list[str]:
    """File names of the training images by index."""
    content = json.loads((toy / "annotations" / "instances_train.json").read_text())
    return sorted(image["file_name"] for image in content["images"])


@pytest.mark.parametrize("stage", DIVERGING)
def test_the_step_is_repeated_as_it_was(stage: str, workspace: Path, toy: Path, names: list[str]) -> None:
    folder, error = diverge(stage, workspace, toy)
    assert f"lower --lr, or look for the cause: `aligndet replay {stage}/bad`" in error
    before = files_of(workspace)
    told = aligndet("replay", f"{stage}/bad", "-w", workspace, "--json").json()
    assert {name: content for name, content in files_of(workspace).items() if ".index" not in name} == {
        name: content for name, content in before.items() if ".index" not in name
    }
    recorded = json.loads((folder / "diverged.json").read_text())
    assert told["step"] == recorded["step"] > 0
    assert told["images"] == [names[index] for index in recorded["ranks"][0]["images"]]
    [losses] = told["losses"]
    assert losses and {name: loss["now"] for name, loss in losses.items()} == recorded["ranks"][0]["losses"]
    assert not [loss for loss in losses.values() if loss["now"] != loss["then"]]
    first, _, value = told["first_not_finite"].partition(": ")
    part = next(name for name in told["modules"] if first.startswith(name))
    assert told["modules"][part]["first_not_finite"] == f"{first}: {value}" and value.startswith(("nan", "inf", "-inf"))
    assert told["grad_norm"] in ("nan", "inf")
    text = aligndet("replay", "-w", workspace).stdout  # the last one
    assert text.strip().splitlines()[-1] == f"first value that is not finite: output of {told['first_not_finite']}"


@pytest.mark.parametrize("stage", ["pretrain-box", "finetune"])
def test_the_state_is_that_before_the_step_to_the_bit(stage: str, workspace: Path, toy: Path) -> None:
    folder, _ = diverge(stage, workspace, toy, *EVERY_STEP)
    dump, found = read_dump(folder), load_checkpoint(folder / "resume")
    assert found is not None and found[0] == dump["step"]  # saved after as many steps as came before it
    saved = found[1]
    for name, tensors in dump["state"].items():
        assert tensors.keys() == saved[name].keys()
        assert [key for key, value in tensors.items() if not torch.equal(value, saved[name][key])] == []
    ours, theirs = dump["optimizer"]["state"], saved["optimizer"]["state"]
    assert all(torch.equal(ours[key]["momentum_buffer"], theirs[key]["momentum_buffer"]) for key in theirs)


def test_there_is_one_dump_and_it_is_overwritten(workspace: Path, toy: Path) -> None:
    folder, _ = diverge("finetune", workspace, toy)
    before = files_of(folder)
    diverge("finetune", workspace, toy)
    after = files_of(folder)
    assert [name for name in after if "diverged" in name] == ["diverged.json", "resume/diverged.pt"]
    assert after["resume/diverged.pt"] == before["resume/diverged.pt"]
    aligndet("finetune", "-w", workspace, *CHAIN["finetune"], "--name", "bad", "--no-resume")
    line = aligndet("replay", "-w", workspace, "finetune/bad", code=2).error_line()
    assert "finetune/bad: no such run that diverged" in line


def test_gradients_that_alone_are_not_finite_are_told(workspace: Path, toy: Path) -> None:
    diverge("pretrain-box", workspace, toy, "--lr", "1e8")
    told = aligndet("replay", "-w", workspace, "--json").json()
    assert told["first_not_finite"] is None and told["grad_norm"] == "inf"
    assert all(loss["now"] not in ("nan", "inf") for loss in told["losses"][0].values())
    last = aligndet("replay", "-w", workspace).stdout.strip().splitlines()[-1]
    assert "gradient" in last and "first value that is not finite: " in last


@pytest.mark.parametrize("stage", ["pretrain-box", "finetune"])
def test_a_bad_image_is_told_from_bad_weights(
    stage: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    name = {"pretrain-box": "pretrain_box.methods.aligndet"}.get(stage, f"{stage.replace('-', '_')}.views")
    views = import_module(f"aligndet_cli.{name}")
    original = views.make_batch

    def with_nan(samples: Sequence[Sample], *rest: Any, **named: Any) -> Any:
        images, targets = original(samples, *rest, **named)
        for place, sample in enumerate(samples):
            if sample.index == 5:
                images.pixels[place, 0, 3, 4] = float("nan")
        return images, targets

    monkeypatch.setattr(views, "make_batch", with_nan)
    ran = aligndet(stage, "-w", workspace, *CHAIN[stage], "--batch-size", "4", "--name", "bad", code=1)
    assert "diverged" in ran.error_line()
    told = aligndet("replay", "bad", "-w", workspace, "--json").json()
    assert names[5] in told["images"] and told["weights_not_finite"] == []
    detector = "model" if stage == "finetune" else "pretext.online"
    assert told["first_not_finite"].startswith(f"{detector}.backbone.")


def test_a_loss_that_alone_is_not_finite_is_named(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = RetinaNet.forward

    def with_nan(self: RetinaNet, *rest: Any) -> dict[str, torch.Tensor]:
        losses = original(self, *rest)
        return {**losses, "loss_box_reg": losses["loss_box_reg"] * float("nan")}

    monkeypatch.setattr(RetinaNet, "forward", with_nan)
    aligndet("finetune", "-w", workspace, *CHAIN["finetune"], "--name", "bad", code=1)
    told = aligndet("replay", "bad", "-w", workspace, "--json").json()
    losses = {name: loss["now"] for name, loss in told["losses"][0].items()}
    assert losses["loss_box_reg"] == "nan" != losses["loss_cls"] and told["step"] == 0
    last = aligndet("replay", "bad", "-w", workspace).stdout.strip().splitlines()[-1]
    assert last == "first value that is not finite: loss_box_reg, all outputs of modules before it were finite"


def test_what_cannot_be_repeated_is_one_line(workspace: Path, toy: Path, tmp_path: Path) -> None:
    line = aligndet("replay", "-w", workspace, code=2).error_line()
    assert line.endswith("no run that diverged; a run leaves its bad step here until it is begun again")
    data = Path(shutil.copytree(toy, tmp_path / "toy"))
    aligndet("finetune", data, "-w", workspace, *DIVERGING["finetune"], "--name", "bad", code=1)
    assert "finetune/bad" in aligndet("replay", "nothing", "-w", workspace, code=2).error_line()
    assert "'tpu' is not a choice" in aligndet("replay", "-w", workspace, "--accelerator", "tpu", code=2).error_line()
    folder = workspace / "finetune" / ".bad.partial"
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    file.write_text(json.dumps(content))
    line = aligndet("replay", "-w", workspace, code=2).error_line()
    assert "input data: " in line and "its step cannot be repeated" in line
    shutil.copytree(toy, data, dirs_exist_ok=True)
    (folder / "resume" / "diverged.pt").write_bytes(b"half")
    assert "diverged.pt: cannot be read" in aligndet("replay", "-w", workspace, code=4).error_line()
