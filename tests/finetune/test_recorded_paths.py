"""Paths that runs record: from the root on, and the same file for a command that is given in another folder."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from torchvision.models import resnet18

from aligndet_cli.config import STAGES, FileOr, StageConfig, assign, flatten, with_absolute_paths
from aligndet_cli.stage import find_stage
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from helpers.commandline import CHAIN, DETECTOR, SMALL, Ran, aligndet
from helpers.small_detectors import detector_file

DATA = ("data.root", "data.annotations", "data.images")
PATHS = {
    "pretrain-image": (*DATA, "backbone.weights", "teacher"),
    "proposals": (*DATA, "import_file", "export_file", "cue_weights"),
    "cluster": (*DATA, "import_file", "backbone.weights"),
    "pretrain-box": (*DATA, "backbone.weights", "embedder"),
    "finetune": (*DATA, "backbone.weights", "init", "pixel_maps"),
    "evaluate": DATA,
}
WORDS = ("auto", "workspace", "none", "DEFAULT", "IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V2")


def path_settings(config: BaseModel, prefix: str = "") -> Iterator[str]:
    """All settings of a config that may be a path, by their types."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from path_settings(value, f"{prefix}{name}.")
        elif "Path" in str(field.annotation) or any(isinstance(mark, FileOr) for mark in field.metadata):
            yield f"{prefix}{name}"


def absolute(stage: str, path: str, value: str) -> StageConfig:
    values: dict = {}
    assign(values, path, value)
    return with_absolute_paths(find_stage(stage).steps().config.model_validate(values))


def at(config: StageConfig, path: str) -> object:
    value: object = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("stage", STAGES)
def test_the_list_of_paths_is_complete(stage: str) -> None:
    assert sorted(path_settings(find_stage(stage).steps().config())) == sorted(PATHS[stage])


@pytest.mark.parametrize(("stage", "path"), [(stage, path) for stage, paths in PATHS.items() for path in paths])
def test_every_path_is_recorded_from_the_root_on(
    stage: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = find_stage(stage).steps().config()
    for value in ("some.pth", "sub/some", "../some.safetensors", "plain"):
        (tmp_path / "plain").touch()
        config = absolute(stage, path, value)
        recorded = str(at(config, path))
        assert recorded == str(tmp_path / value) and dict(flatten(config.to_json())).get(path) in (recorded, None)
        assert with_absolute_paths(config) is config and (
            path == "init" or not config.changes_since(typed.hashed_settings())
        )
    if path in ("backbone.weights", "init"):
        for word in WORDS if path == "backbone.weights" else ("pretrain", "backbone", "scratch"):
            assert at(absolute(stage, path, word), path) == word
            (tmp_path / word).mkdir()
            assert at(absolute(stage, path, word), path) == word


# ---- the control without pre-training starts from the file of then ----


@pytest.fixture(scope="module")
def trained(toy: Path, module_folder: Path) -> Path:
    """A folder with moco.pth, toy images and a workspace whose run was given `--backbone-weights moco.pth`."""
    save_moco(module_folder / "moco.pth", seed=0)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(module_folder)
        shutil.copytree(toy, "toy")
        aligndet("proposals", "toy", "-w", "ws", *CHAIN["proposals"])
        steps = ("--steps", "1", "--batch-size", "2")
        aligndet("pretrain-box", "-w", "ws", *DETECTOR, *SMALL[:-4], *steps, "--backbone-weights", "moco.pth", "-q")
    return module_folder


def save_moco(file: Path, seed: int) -> None:
    torch.manual_seed(seed)
    torch.save({f"module.encoder_q.{name}": value for name, value in resnet18().state_dict().items()}, file)


@pytest.fixture
def elsewhere(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace in the current folder."""
    shutil.copytree(trained / "ws", tmp_path / "ws")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def control(*words: str, code: int = 0) -> Ran:
    return aligndet("finetune", "-w", "ws", "--init", "backbone", *DETECTOR, "--dry-run", "--json", *words, code=code)


def test_the_folder_of_the_next_command_does_not_matter(trained: Path, elsewhere: Path) -> None:
    (recorded,) = (json.loads(file.read_text()) for file in elsewhere.glob("ws/pretrain-box/*/config.json"))
    assert recorded["backbone"]["weights"] == str(trained / "moco.pth")
    assert recorded["data"]["root"] == str(trained / "toy")
    told = f"backbone only, {trained / 'moco.pth'} (MoCo layout)"
    assert control().json()["effective"]["weights"] == told
    save_moco(elsewhere / "moco.pth", seed=1)  # another file of that name
    assert control().json()["effective"]["weights"] == told
    given = control("--backbone-weights", "moco.pth").json()["effective"]["weights"]
    assert given == f"backbone only, {elsewhere / 'moco.pth'} (MoCo layout)"


@pytest.mark.parametrize("kind", ["changed", "gone"])
def test_another_file_in_its_place_is_one_line(kind: str, trained: Path, elsewhere: Path) -> None:
    file, kept = trained / "moco.pth", (trained / "moco.pth").read_bytes()
    file.unlink()
    if kind == "changed":
        save_moco(file, seed=2)
    try:
        line = control(code=4).stderr.strip().splitlines()[-1]
    finally:
        file.write_bytes(kept)
    wanted = (
        "is not the file that pretrain-box/retinanet-resnet18 started from; put"
        if kind == "changed"
        else "no such file"
    )
    assert str(file) in line and wanted in line


def test_paths_as_typed_of_earlier_runs_are_compared(trained: Path, elsewhere: Path) -> None:
    (config,) = elsewhere.glob("ws/pretrain-box/*/config.json")
    config.write_text(config.read_text().replace(str(trained / "moco.pth"), "moco.pth"))
    assert "moco.pth: no such file" in control(code=4).stderr
    save_moco(elsewhere / "moco.pth", seed=1)
    assert "moco.pth is not the file that pretrain-box/retinanet-resnet18 started from" in control(code=4).stderr
    shutil.copy(trained / "moco.pth", elsewhere)
    assert control().json()["effective"]["weights"] == "backbone only, moco.pth (MoCo layout)"


def test_an_import_records_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(mmdet_checkpoint(replace(detector_file("fcos"), categories=()))[0], "model.pth")
    labels = [{"id": number, "name": name} for number, name in enumerate("abc", start=1)]
    Path("labels.json").write_text(json.dumps({"categories": labels}))
    words = ("import-weights", "--name", "it", "--style", "pytorch", "--categories", "labels.json", "-w")
    aligndet(*words, "ws", "model.pth")
    recorded = json.loads(Path("ws/finetune/it/config.json").read_text())
    assert (recorded["file"], recorded["categories"]) == (str(tmp_path / "model.pth"), str(tmp_path / "labels.json"))
    assert "already complete" in aligndet(*words, "ws", "model.pth").stdout
    Path("labels.json").write_text(json.dumps({"categories": labels[::-1]}))  # another file of that name
    assert "input categories: " in aligndet(*words, "ws", "model.pth", code=2).error_line()


def test_a_run_with_a_relative_import_is_complete_from_elsewhere(
    trained: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = next(trained.glob("toy/annotations/*train*.json"))
    shutil.copy(labels, elsewhere / "boxes.json")
    words = (trained / "toy", "--name", "given")
    aligndet("proposals", *words, "-w", "ws", "--import", "boxes.json")
    recorded = json.loads((elsewhere / "ws/proposals/given/config.json").read_text())
    assert recorded["import_file"] == str(elsewhere / "boxes.json")
    (elsewhere / "other").mkdir()
    monkeypatch.chdir(elsewhere / "other")
    again = aligndet("proposals", *words, "-w", "../ws", "--import", "../boxes.json", "--json").json()
    assert again["status"] == "already complete"
