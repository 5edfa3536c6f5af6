"""The command line as a whole: exit codes, messages, and what goes to which stream."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from aligndet_cli.cli import EXAMPLES, EXIT_CODES, app
from aligndet_cli.config import STAGES
from aligndet_cli.errors import ERROR_BY_EXIT_CODE
from aligndet_cli.flags import help_of, known_settings
from aligndet_cli.stage import find_stage
from aligndet_cli.training import learner
from helpers.commandline import BACKBONE, CHAIN, RANDOM, Ran, aligndet, files_of

STAGE_FLAGS = {name: find_stage(name).flags for name in STAGES}
FLAG_SNAPSHOT = Path(__file__).parent / "flags.txt"


@pytest.fixture
def workspace(chain: Path, tmp_path: Path) -> Path:
    """A copy of the finished chain, to be changed at will."""
    return Path(shutil.copytree(chain, tmp_path / "workspace"))


# ---- usage ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "trainig.steps=3"], "trainig: unknown key (from --set); did you mean 'training'?"),
        (["--set", "detector.neck_chanels=3"], "did you mean 'neck_channels'?"),
        (["--detector", "retinanett"], "detector.family: 'retinanett' is not a choice (from --detector); did you mean"),
        (["--backbone", "resnet19"], "backbone.name: 'resnet19' is not a choice (from --backbone); did you mean"),
        (["--set", "detector=3"], "detector: is a group of settings"),
        (
            ["--detector", "fcos", "--set", "detector.positive_iou=1"],
            "detector.positive_iou: unknown key (from --set); did",
        ),
        (["--set", "seed.b=7"], "seed: should be a valid integer, got {'b': 7} (from --set)"),
        (["--set", "nothing"], "--set nothing: write it as --set some.key=value"),
        (["--short-side", "64,,96"], "views.short_side.1: should be a valid integer"),
        (["--short-side", "-5"], "views.short_side.0: should be greater than or equal to 32"),
        (["--set", "views.short_side=[]"], "views.short_side: "),
        (["--set", "training.logger=3"], "training.logger: should be a list, written as [1, 2], got 3 (from --set)"),
        (
            ["--detector", "htc", "--set", "detector.head_weights=1,0.5,0"],
            "detector.head_weights: should be a list, written as [1, 2], got '1,0.5,0' (from --set)",
        ),
        (
            ["--detector", "htc", "--set", "detector.head_weights=[1,0.5]"],
            "detector.head_weights.2: has no value; the list is too short, got [1, 0.5] (from --set)",
        ),
        (
            ["--detector", "htc", "--set", "detector.head_weights=[0,0,0]"],
            "detector.head_weights: one should be above 0, or no head is trained, got [0, 0, 0] (from --set)",
        ),
        (["--long-side", "1"], "views.long_side: should be greater than or equal to 32"),
        (["--num-workers", "many"], "runtime.num_workers: should be a valid integer"),
        (["--num-workers", "-3"], "runtime.num_workers: should be greater than or equal to 0, or 'auto'"),
        (["--set", "training.checkpoint.every_steps=0"], "training.checkpoint.every_steps: should be greater than"),
        (["--lr", "nan"], "training.lr: should be a finite number"),
        (["--lr", "1e300"], "training.lr: should be less than or equal to 1e+30"),
        (["--epochs", "1", "--steps", "2"], "--epochs and --steps: give one of them"),
        (["--name", "../x"], "name: "),
        (["--name", "x" * 300], "name: String should have at most 128 characters"),
        (["--progress", "loud"], "--progress loud: write auto, bar, plain or none"),
        (["--devices", "x"], "--devices x: write auto, a number, or a list like 0,1"),
        (["--devices", "2", "--accelerator", "cpu", "--batch-size", "3"], "--batch-size 3: must be a multiple of"),
        (["--config", "/nowhere.toml"], "--config /nowhere.toml: no such file"),
        (["--config", "/dev/zero"], "--config /dev/zero: longer than 1 MB, so no file of settings"),
        (["--config", "/"], "--config /: cannot be read (Is a directory)"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_2(chain: Path, words: list[str], said: str) -> None:
    assert (
        said
        in aligndet("pretrain-box", "-w", chain, "--backbone-weights", "none", "--dry-run", *words, code=2).error_line()
    )


def test_unknown_option_names_the_nearest() -> None:
    ran = aligndet("finetune", "--detektor", "x", code=2)
    assert "No such option: --detektor" in ran.stderr and "--detector" in ran.stderr and ran.stdout == ""
    assert "Did you mean" in aligndet("ls", "detector", code=2).stderr


def test_unknown_command_exits_2() -> None:
    assert "pretrain-box" in aligndet("pretrain-bx", code=2).stderr


def test_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("pretrain-image", "proposals", "finetune", "evaluate", "doctor"):
        line = aligndet(command, code=2).error_line()
        assert f"which data? name it: `aligndet {command} DATA` (a COCO, VOC or YOLO root" in line
        assert ("root with labels)" if command in ("finetune", "evaluate") else "folder of images") in line
    for command in ("cluster", "pretrain-box"):
        assert "proposals not found: run `aligndet proposals DATA` first" in aligndet(command, code=2).error_line()
    assert list(tmp_path.iterdir()) == []


def test_stages_in_the_wrong_order(toy: Path, tmp_path: Path) -> None:
    for command, needed in (("pretrain-box", "proposals DATA"), ("finetune", "pretrain-box"), ("evaluate", "finetune")):
        line = aligndet(command, toy, "-w", tmp_path / "new", code=2).error_line()
        assert f"`aligndet {needed}" in line, line
    assert not (tmp_path / "new").exists()


def test_missing_and_empty_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    workspace = ("-w", tmp_path / "w")
    assert "nowhere: no such file or folder" in aligndet("proposals", tmp_path / "nowhere", *workspace, code=3).stderr
    line = aligndet("proposals", tmp_path / "empty", *workspace, code=3).error_line()
    assert f"{tmp_path / 'empty'}: no images found in it" in line


def test_half_a_json(toy: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(toy, tmp_path / "toy"))
    file = data / "annotations" / "instances_train.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for command in ("proposals", "finetune"):
        line = aligndet(command, data, "-w", tmp_path / "w", code=3).error_line()
        assert f"{file}: not valid JSON" in line and "download" in line
    assert not (tmp_path / "w").exists()


def test_no_gpu_here(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = aligndet("pretrain-box", "-w", chain, "--accelerator", "gpu", code=2)
    assert "--accelerator gpu: no GPU is visible" in ran.error_line()


# ---- weights, gates, interruption ----


@pytest.mark.parametrize("content", [b"", b"not weights at all", None])
def test_corrupt_weights_exit_4(workspace: Path, content: bytes | None) -> None:
    file = workspace / "finetune" / "retinanet-resnet18" / "weights.pt"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    assert f"{file}: not a readable PyTorch file" in aligndet("evaluate", "-w", workspace, code=4).error_line()
    ran = aligndet("finetune", "-w", workspace, "--init", file, "--name", "other", code=4)
    assert str(file) in ran.error_line()


def test_weights_of_another_kind_exit_4(chain: Path, tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    line = aligndet("finetune", "-w", chain, "--init", tmp_path / "x.pt", "--name", "other", code=4).error_line()
    assert "x.pt: not a detector of aligndet" in line
    pretrained = chain / "pretrain-box" / "retinanet-resnet18" / "weights.pt"
    words = ("--backbone-weights", tmp_path / "nothing.pth", "--name", "other")
    assert "nothing.pth" in aligndet("pretrain-box", "-w", chain, *words, code=4).error_line()
    words = ("--backbone", "resnet50", "--init", pretrained)
    assert "has a resnet18, not a resnet50" in aligndet("finetune", "-w", chain, *words, code=2).error_line()


def test_fail_under_exits_6_with_the_result_on_stdout(workspace: Path) -> None:
    ran = aligndet("evaluate", "-w", workspace, "--fail-under", "0.99", "--json", code=6)
    content = ran.json()
    assert content["status"] == "already complete" and content["result"]["AP"] < 0.99
    assert "below --fail-under 0.99" in ran.error_line()
    assert aligndet("evaluate", "-w", workspace, "--fail-under", "0").code == 0


def test_a_comparison_is_part_of_the_result_and_printed_once(workspace: Path) -> None:
    aligndet("evaluate", "-w", workspace, "--name", "other")
    ran = aligndet("evaluate", "-w", workspace, "--compare", "other", "--json")
    assert ran.json()["compare"]["with"] == "other" and "against" not in ran.stderr
    ran = aligndet("evaluate", "-w", workspace, "--compare", "other")
    assert ran.stdout.count("against") == 1 and "against" not in ran.stderr and "compare" not in ran.stdout
    ap = next(line.split() for line in ran.stdout.splitlines() if line.startswith("  AP  "))
    compared = [line.split() for line in ran.stdout.partition("against")[2].splitlines()]
    assert ["AP", ap[1], ap[1], "+0.0"] in compared  # in percent, as the result above
    line = aligndet("evaluate", "-w", workspace, "--compare", "retinanet-resnet18", code=2).error_line()
    assert "--compare retinanet-resnet18: is the run itself" in line
    line = aligndet("evaluate", "-w", workspace, "--compare", "nothing", code=2).error_line()
    assert "no run of that name; finetune runs here: retinanet-resnet18" in line


def test_a_gate_in_percent_is_a_question(workspace: Path) -> None:
    line = aligndet("evaluate", "-w", workspace, "--fail-under", "50", code=2).error_line()
    assert "fail_under: should be 0 to 1 (did you mean 0.5?), got 50.0 (from --fail-under)" in line
    assert "did you mean" not in aligndet("evaluate", "-w", workspace, "--fail-under", "500", code=2).error_line()


def ending(ran: Ran) -> tuple[str, list[Path], list[str]]:
    """The three lines at the end of a stage: the first, the files to look at, the words of the next command."""
    took, look, go_on = ran.stderr.splitlines()[-3:]
    assert look.startswith("look at: ") and go_on.startswith("next: aligndet ")
    return took, [Path(file) for file in look.removeprefix("look at: ").split("  ")], go_on.split()[2:]


def test_each_stage_says_how_it_went_and_how_to_go_on(workspace: Path, toy: Path) -> None:
    """Every next command works as it is printed, where nothing in capitals is left to fill in."""
    place, after = ["-w", str(workspace)], {}
    expected = {
        "proposals": ("boxes per image in 13 images", ["pretrain-box", "--backbone-weights", "DEFAULT"]),
        "cluster": ("boxes in 4 clusters", ["pretrain-box", "--detector", "detr", *BACKBONE, *RANDOM]),
        "pretrain-box": ("too short, contrastive loss", ["finetune", "--detector", "retinanet"]),
        "finetune": ("(at the start", ["evaluate"]),
        "evaluate": (": AP ", ["predict", "IMAGES"]),
    }
    for stage, (number, words) in expected.items():
        data = (toy,) if stage == "proposals" else ()
        took, files, go_on = ending(aligndet(stage, *data, "-w", workspace, *CHAIN[stage]))
        assert re.match(r"made \d{4}-\d\d-\d\d \d\d:\d\d UTC: ", took) and number in took, took
        assert files and all(file.exists() for file in files)
        assert go_on == [*words, *place]
        after[stage] = go_on
    for stage in ("pretrain-box", "finetune"):
        aligndet(*after[stage], "--dry-run")
    for silent in ("--json", "--quiet"):
        assert "next: " not in aligndet("evaluate", "-w", workspace, silent).stderr
    aligndet("evaluate", "-w", workspace, "--name", "other")
    took, _, go_on = ending(aligndet("evaluate", "-w", workspace))
    assert "--compare other" in " ".join(go_on)
    aligndet(*go_on)
    assert ending(aligndet("evaluate", "-w", workspace))[2] == ["report", "--html", *place]


def test_the_next_command_names_data_that_the_workspace_does_not_remember(
    workspace: Path, toy: Path, tmp_path: Path
) -> None:
    """Proposals of a folder without labels, then labels elsewhere."""
    labelled = Path(shutil.copytree(toy, tmp_path / "my labels"))
    words = (*CHAIN["finetune"], "--name", "elsewhere", "--init", "scratch", "--steps", "1")
    ran = aligndet("finetune", labelled, "-w", workspace, *words)
    took, _, go_on = ending(ran)
    assert re.match(r"took (\d+ min )?[\d.]+ s: loss ", took)
    assert shlex.split(" ".join(go_on)) == ["evaluate", str(labelled), "-w", str(workspace)]
    shutil.rmtree(labelled / "val")
    (labelled / "annotations" / "instances_val.json").unlink()
    # There is nothing to measure on.
    assert ending(aligndet("finetune", labelled, "-w", workspace, *words))[2] == [
        "predict",
        "IMAGES",
        "-w",
        str(workspace),
    ]


def test_an_export_that_fails_comes_after_the_result(workspace: Path, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ("proposals", toy, "-w", workspace, *CHAIN["proposals"], "--export", tmp_path / "file" / "boxes.json")
    ran = aligndet(*words, "--json", code=2)
    assert ran.json()["status"] == "already complete" and ran.json()["result"]["images"] == 13
    assert "--export" in ran.error_line()
    assert "is a folder; name a file" in aligndet(*words[:-1], tmp_path, "-n", code=2).error_line()


def test_ctrl_c_exits_130(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learner, "train", interrupted)
    ran = aligndet("finetune", "-w", workspace, *CHAIN["finetune"], "--name", "other", code=130)
    assert ran.error_line() == "error: interrupted; run the same command again to continue"
    content = json.loads(aligndet("status", "-w", workspace, "--json").stdout)
    states = {row["run"]: row["state"] for row in content["runs"] if row["stage"] == "finetune"}
    assert states == {"retinanet-resnet18": "complete", "other": "interrupted"}


# ---- run again, dry run, streams ----


def test_everything_is_already_complete(workspace: Path, toy: Path) -> None:
    before = files_of(workspace)
    for stage, words in CHAIN.items():
        data = (toy,) if stage == "proposals" else ()
        ran = aligndet(stage, *data, "-w", workspace, *words)
        assert ran.stdout.startswith("already complete: "), ran.stdout
        assert "protocol" not in ran.stdout  # the effective settings again, for the report alone
    assert files_of(workspace) == before


@pytest.mark.parametrize(
    ("stage", "words", "difference"),
    [
        ("proposals", ("--min-size", "20"), "min_size: 16 -> 20"),
        ("cluster", ("--seed", "3"), "seed: 0 -> 3"),
        ("pretrain-box", ("--lr", "0.5"), "training.lr: None -> 0.5"),
        ("finetune", ("--steps", "7"), "training.steps: 6 -> 7"),
        ("evaluate", ("--short-side", "128"), "short_side: None -> 128"),
    ],
)
def test_changed_settings_are_refused(chain: Path, stage: str, words: tuple[str, ...], difference: str) -> None:
    line = aligndet(stage, "-w", chain, *CHAIN[stage], *words, code=2).error_line()  # the last of two flags counts
    assert difference in line and "--force" in line and "--name" in line, line


def test_changed_data_is_refused(workspace: Path, toy: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(toy, tmp_path / "toy"))
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    line = aligndet("finetune", data, "-w", workspace, *CHAIN["finetune"], code=2).error_line()
    assert "input data: " in line and "--force" in line
    line = aligndet("pretrain-box", data, "-w", workspace, *CHAIN["pretrain-box"], code=2).error_line()
    assert "not the data that" in line and "aligndet proposals" in line


def test_dry_run_writes_nothing(chain: Path, toy: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert "would be written" in aligndet("proposals", toy, "-w", new, "--dry-run").stdout
    assert not new.exists()
    before = files_of(chain)
    for stage, words in CHAIN.items():
        assert "is already complete" in aligndet(stage, "-w", chain, *words, "-n").stdout
        ran = aligndet(stage, "-w", chain, *words, "-n", "--name", "other", "--json")
        content = ran.json()
        assert (content["status"], content["action"], content["result"]) == ("dry run", "start", {})
        assert content["effective"] and str(chain / stage / "other") == content["folder"]
    assert files_of(chain) == before and not list(chain.glob("*/.*"))


def test_stdout_is_the_result_and_nothing_else(workspace: Path) -> None:
    words = ("-w", workspace, "--name", "other", "--json")
    content = aligndet("evaluate", *words).json()
    assert content["status"] == "done" and content["result"]["metric"] == "AP"
    assert content["folder"] == str(workspace / "evaluate" / "other")
    ran = aligndet("evaluate", *words, "--force")
    assert ran.json()["status"] == "done" and "evaluate: 11/11 images" in ran.stderr
    # A mistake is one object as well, so that programs need not read stderr.
    ran = aligndet("evaluate", "-w", workspace, "--json", "--run", "nothing", code=2)
    assert ran.json()["exit_code"] == 2 and ran.json()["message"] in ran.error_line()
    assert aligndet("status", "-w", workspace, "--json").json()["command"] == "status"
    assert aligndet("evaluate", *words[:4], "--quiet").stderr == ""


@pytest.mark.plots
def test_force_keeps_the_old_artifact_until_the_new_one_is_ready(workspace: Path) -> None:
    folder = workspace / "evaluate" / "retinanet-resnet18-val"
    before = files_of(folder)
    aligndet("evaluate", "-w", workspace, "--force")
    after = files_of(folder)
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] != before[name]} == {"manifest.json"}
    assert not list(workspace.glob("evaluate/.*"))


# ---- settings ----


def test_file_then_set_then_flag(chain: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[finetune]\nseed = 1\n[finetune.training]\nsteps = 11\nlr = 0.5\n[evaluate]\nseed = 9\n")
    set_ = ("--set", "training.steps=12", "--set", "seed=2")
    shown = aligndet("config", "show", "finetune", "--config", file, *set_, "--json").json()
    assert shown["config"]["training"]["steps"] == 12 and shown["config"]["training"]["lr"] == 0.5
    assert shown["config"]["seed"] == 2
    origins = {key: origin for key, origin in shown["origins"].items() if origin != "recipe"}
    assert origins == {"seed": "--set", "training.steps": "--set", "training.lr": str(file)}
    words = ("finetune", "-w", chain, "-n", "--json", "--init", "scratch", "--config", file, *set_, "--steps", "13")
    effective = aligndet(*words).json()["effective"]
    assert effective["steps"].startswith("13 ") and effective["learning rate"] == "0.5 (given)"


def test_settings_of_no_stage() -> None:
    line = aligndet("config", "show", code=2).error_line()
    assert line.startswith("error: which stage? name it: `aligndet config show STAGE`; there are: pretrain-image, ")
    assert "'finetun' is not a stage; did you mean 'finetune'?" in aligndet("config", "show", "finetun", code=2).stderr


def test_a_toml_with_an_unknown_stage(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[finetune]\nseed = 1\n[finetnue]\nseed = 2\n")
    line = aligndet("config", "show", "finetune", "--config", file, code=2).error_line()
    assert "'finetnue' is not a stage; did you mean 'finetune'?" in line
    file.write_text("[finetune\n")
    assert f"--config {file}: not valid TOML" in aligndet("config", "show", "finetune", "-c", file, code=2).error_line()


@pytest.mark.parametrize("stage", CHAIN)
def test_shown_settings_can_be_given_back(stage: str, tmp_path: Path) -> None:
    changed = ("--set", "seed=5", "--set", "name=a.b")
    shown = aligndet("config", "show", stage, *changed, "--origin").stdout
    assert "seed = 5  # --set" in shown and "# default" in shown
    file = tmp_path / "shown.toml"
    file.write_text(shown)
    again = aligndet("config", "show", stage, "--config", file).stdout
    assert again.splitlines() == [line.split("  # ")[0] for line in shown.splitlines()]
    assert "not a stage; did you mean" in aligndet("config", "show", stage[:-1], code=2).error_line()


@pytest.mark.parametrize(("init", "rate"), [("pretrain", 0.015), ("scratch", 0.01)])  # docs/paper.md §5.1
def test_a_preset_that_is_given_back_trains_the_same(chain: Path, tmp_path: Path, init: str, rate: float) -> None:
    settings = ("backbone.name=resnet18", "detector.neck_channels=32", "detector.head_convs=1", "training.steps=6")
    settings += ("training.batch_size=2", "resolution.short_side=[64]", "name=again", f"init={init}")
    words = [word for setting in settings for word in ("--set", setting)]
    shown = aligndet("config", "show", "finetune", *words, "--origin").stdout
    lines = [
        f"training.lr = {rate * 2 / 16}",
        'training.schedule = "1x"',
        'detector.neck_norm = "batch"',
        'recipe = "default"',
        'resolution.policy = "resize"',
    ]
    assert all(f"{line}  # recipe\n" in shown for line in lines)
    assert "training.steps = 6  # --set\n" in shown and "long_side = 1333  # default\n" in shown
    assert "# training.clip_norm is not set  # default\n" in shown
    file = tmp_path / "shown.toml"
    file.write_text(shown)
    common = ("finetune", "-w", chain, "-n", "--json")
    typed, given_back = (aligndet(*common, *more).json()["effective"] for more in (words, ("--config", file)))
    for of_run in (typed, given_back):  # where the numbers come from does differ
        for key in ("learning rate", "weight decay", "recipe"):
            of_run[key] = of_run[key].split(" (")[0]
    assert typed == given_back and typed["learning rate"] == f"{rate / 8:g}"


def test_what_is_typed_wins_over_what_is_remembered(workspace: Path, toy: Path) -> None:
    """The workspace remembers `format: auto`; that must not undo a --format that was typed."""
    words = ("finetune", "-w", workspace, "--init", "scratch", "--format", "voc", "--dry-run")
    assert f"{toy}: no voc data set" in aligndet(*words, code=3).error_line()


def test_remembered_training_labels_are_not_evaluated_on(toy: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    places = ("--annotations", toy / "annotations" / "instances_train.json", "--images", toy / "train")
    aligndet("proposals", *places, "-w", workspace, "--source", "ground-truth", "--num-workers", "1")
    words = ("finetune", "-w", workspace, "--init", "scratch", *CHAIN["finetune"])
    aligndet(*words)
    line = aligndet("evaluate", "-w", workspace, code=2).error_line()
    assert "remembers only labels for training: use --annotations FILE --images DIR" in line
    places = ("--annotations", toy / "annotations" / "instances_val.json", "--images", toy / "val")
    assert aligndet("evaluate", *places, "-w", workspace, "--json").json()["result"]["images"] == 11


# ---- the helpers beside the stages ----


def test_lists() -> None:
    assert "retinanet" in aligndet("ls", "detectors").stdout.split()
    assert "IMAGENET1K_V2" in aligndet("ls", "backbones").stdout
    assert aligndet("--version").stdout.strip()


def rows_of(ran: Ran) -> dict[str, dict[str, str]]:
    return {row["stage"]: row for row in ran.json()["runs"]}


def test_status_shows_the_chain(workspace: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(aligndet("status", "-w", workspace, "--json"))
    assert {stage: (row["run"], row["state"], row["made_from"]) for stage, row in rows.items()} == {
        "proposals": ("train", "complete", []),
        "cluster": ("train-k4", "complete", ["proposals/train"]),
        "pretrain-box": ("retinanet-resnet18", "complete", ["proposals/train"]),
        "finetune": ("retinanet-resnet18", "complete", ["pretrain-box/retinanet-resnet18"]),
        "evaluate": ("retinanet-resnet18-val", "complete", ["finetune/retinanet-resnet18"]),
    }
    # Into a file or a pipe, where nothing says how wide it is, no name is cut.
    monkeypatch.setenv("COLUMNS", "80")
    table = aligndet("status", "-w", workspace).stdout
    for row in rows.values():
        assert row["run"] in table and all(name in table for name in row["made_from"])
    # Other proposals make all that was made from the old ones stale; redoing the same ones does not.
    aligndet("proposals", toy, "-w", workspace, *CHAIN["proposals"], "--force")
    assert {row["state"] for row in rows_of(aligndet("status", "-w", workspace, "--json")).values()} == {"complete"}
    aligndet("proposals", toy, "-w", workspace, "--source", "ground-truth", "--num-workers", "1", "--force")
    rows = rows_of(aligndet("status", "-w", workspace, "--json"))
    assert {stage for stage, row in rows.items() if row["state"] == "stale"} == set(CHAIN) - {"proposals"}
    assert rows["pretrain-box"]["remark"] == "proposals changed or gone since"
    assert rows["finetune"]["remark"] == "pretrain-box/retinanet-resnet18 is stale"


def test_toy_draws_both_kinds(tmp_path: Path) -> None:
    assert aligndet("toy", tmp_path / "scenes", "--train", 2, "--val", 1).stdout.split() == [str(tmp_path / "scenes")]
    aligndet("toy", tmp_path / "objects", "--objects", "--train", 5, "--val", 1, "--seed", 3)
    scenes = json.loads((tmp_path / "scenes/annotations/instances_train.json").read_text())
    assert len(scenes["images"]) == len(list((tmp_path / "scenes/train").iterdir())) == 2
    assert sorted(folder.name for folder in (tmp_path / "objects/train").iterdir()) == [
        category["name"] for category in sorted(scenes["categories"], key=lambda category: category["name"])
    ]


def test_status_of_nothing(tmp_path: Path) -> None:
    assert "empty; start with `aligndet proposals DATA`" in aligndet("status", "-w", tmp_path / "none").stdout
    assert aligndet("status", "-w", tmp_path / "none", "--json").json()["runs"] == []


def test_doctor(toy: Path, tmp_path: Path) -> None:
    ran = aligndet("doctor", toy, "-w", tmp_path / "w", "--json", "--strict")
    assert [finding for finding in ran.json()["findings"] if finding["severity"] != "info"] == []
    data = Path(shutil.copytree(toy, tmp_path / "toy"))
    (data / "train" / "000003.jpg").write_bytes(b"")
    ran = aligndet("doctor", data, "-w", tmp_path / "w", "--json", code=3)
    assert any(finding["severity"] == "error" for finding in ran.json()["findings"])
    assert "000003.jpg" in ran.error_line()
    ran = aligndet("doctor", data, "-w", tmp_path / "w", "--strict", code=3)
    assert "000003.jpg" in ran.stdout and f"coco data at {data}: 1 error, 0 warnings\n" in ran.stdout
    assert "000003.jpg" in ran.error_line()
    assert not (tmp_path / "w").exists()


# ---- the public surface ----


def commands_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command of the Typer app with its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def test_all_flags_are_as_written_down() -> None:
    """`tests/flags.txt` is the public surface; `ALIGNDET_WRITE_FLAGS=1 pytest tests/test_cli.py` writes it anew."""
    lines = []
    for name, command in commands_of(typer.main.get_command(app)):
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            words = [*parameter.opts, *parameter.secondary_opts] if is_option else ["(argument)"]
            is_list = parameter.nargs == -1 or (is_option and parameter.multiple)
            value = "" if is_option and parameter.is_flag else " VALUES" if is_list else " VALUE"
            lines.append(f"{name} {' '.join(words)}{value}")
    text = "\n".join(sorted(lines)) + "\n"
    if os.environ.get("ALIGNDET_WRITE_FLAGS"):
        FLAG_SNAPSHOT.write_text(text)
    assert text == FLAG_SNAPSHOT.read_text(), "flags changed: on purpose? then write tests/flags.txt anew"


@pytest.mark.parametrize("name", STAGES)
def test_help_tells_every_default_and_three_examples(name: str) -> None:
    stage = find_stage(name)
    known = known_settings(name)
    silent = [flag.word for flag in stage.flags if flag.path and not help_of(flag, known[flag.path]).endswith(").")]
    assert silent == []
    for example in stage.examples:
        program, command, *words = shlex.split(example)
        assert (program, command) == ("aligndet", name)
        typer.main.get_command(app).commands[name].make_context(name, words)  # raises for an unknown flag


@pytest.mark.parametrize("name", EXAMPLES)
def test_other_commands_have_examples_that_parse(name: str) -> None:
    for example in EXAMPLES[name]:
        context = typer.main.get_command(app).commands[name].make_context(name, shlex.split(example))
        assert sum(value is not None for value in context.params.values()) >= len(shlex.split(example)) / 2


def test_exit_codes_are_in_the_help() -> None:
    text = aligndet("--help").stdout
    known = {str(code) for code in ERROR_BY_EXIT_CODE} | {"0", "130"}
    assert set(EXIT_CODES) == known
    assert all(meaning in text for meaning in EXIT_CODES.values())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrain-box", "--detector", "r"], ["retinanet"]),
        (["finetune", "--backbone", "swin_"], ["swin_t", "swin_s", "swin_b", "swin_l"]),
        (["proposals", "--mode", "opencv-"], ["opencv-fast", "opencv-quality", "opencv-single"]),
        (["evaluate", "--run", ""], ["retinanet-resnet18"]),
        (["predict", "--run", "ret"], ["retinanet-resnet18"]),
        (["finetune", "--init", "/"], ["{ws}/pretrain-box/retinanet-resnet18/weights.pt"]),
        (["finetune", "--init", "b"], ["backbone"]),
        (["export", "--to", ""], ["mmdet", "torchvision", "onnx"]),
        (["config", "show", "f"], ["finetune"]),
        (["figures", "--run", ""], ["retinanet-resnet18-val", "retinanet-resnet18"]),
        (["import-weights", "--from", "det"], ["detectron2", "detr", "detreg"]),
        (["report", "--format", "c"], ["csv"]),
        (["finetune", "--policy", ""], ["resize", "detr", "lsj", "auto"]),
    ],
)
def test_values_complete_without_torch(words: list[str], expected: list[str], workspace: Path) -> None:
    script = (
        "import sys\n"
        "from aligndet_cli.cli import main\n"
        "sys.argv = ['aligndet']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    sys.exit('imported torch' if 'torch' in sys.modules else 0)\n"
    )
    environment = {
        **os.environ,
        "_ALIGNDET_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["aligndet", *words]),
        "COMP_CWORD": str(len(words)),
        "ALIGNDET_WORKSPACE": str(workspace),
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [word.format(ws=workspace) for word in expected]


@pytest.mark.parametrize("stage", STAGE_FLAGS)
def test_every_flag_sets_a_setting_that_exists(stage: str) -> None:
    known = {key for key in _setting_names(find_stage(stage).steps().config.model_json_schema())}
    for flag in STAGE_FLAGS[stage]:
        assert not flag.path or flag.path in known | {"detector.family"}, f"{stage} {flag.word} -> {flag.path}"
    assert len({flag.parameter for flag in STAGE_FLAGS[stage]}) == len(STAGE_FLAGS[stage])


def _setting_names(schema: dict, node: dict | None = None, prefix: str = "") -> list[str]:
    names = []
    for key, child in (node or schema).get("properties", {}).items():
        names.append(prefix + key)
        if "$ref" in child:
            names += _setting_names(schema, schema["$defs"][child["$ref"].rsplit("/", 1)[1]], f"{prefix}{key}.")
    return names


@pytest.mark.parametrize(
    "words", [["--help"], ["finetune", "--help"], ["finetune", "--detektor", "x"], ["status"], ["pretrian-box"]]
)
def test_help_and_mistakes_do_not_import_torch(words: list[str], tmp_path: Path) -> None:
    """Importing torch makes them slow; tests/benchmarks/startup.py measures the CPU time itself."""
    script = (
        "import sys\n"
        "from aligndet_cli.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    heavy = {'torch', 'torchvision', 'cv2', 'matplotlib', 'sklearn', 'pycocotools'}\n"
        "    sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-500:]
