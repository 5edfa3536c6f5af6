"""`--evaluate-every`, `--early-stop` and `--ema`, in one process and in two, interrupted and not."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet_cli.detectors.checkpoint import read_detector
from helpers.commandline import CHAIN, aligndet, assert_same_results, files_of
from helpers.forks import ForkServer, torchrun_variables
from helpers.interrupting import workspace_before

pytestmark = pytest.mark.e2e

FINETUNE: tuple[str, ...] = ("finetune", "-w", ".", *CHAIN["finetune"], "--steps", "20", "--batch-size", "4")
# 13 images in steps of 4: an epoch is 4 steps. Saved at other steps than evaluated.
FINETUNE += ("--evaluate-every", "1", "--lr", "0.02", "--set", "training.checkpoint.every_steps=3")
EMA = ("--ema", "0.9", "--accumulate", "2")


@pytest.fixture
def before(chain: Path, tmp_path: Path) -> Path:
    return workspace_before("finetune", chain, tmp_path / "workspace")


@pytest.fixture
def here(before: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(before)
    return before


def run_of(workspace: Path) -> Path:
    [run] = [folder for folder in (workspace / "finetune").iterdir() if not folder.name.startswith(".")]
    return run


def logged(run: Path) -> dict[int, float]:
    """AP by finished steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["AP"] for line in lines if "AP" in line}


def result_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "manifest.json").read_text())["result"])


def test_the_best_weights_are_those_of_the_best_step(here: Path) -> None:
    aligndet(*FINETUNE)
    run = run_of(here)
    numbers, best = logged(run), result_of(run)["best"]
    assert list(numbers) == [4, 8, 12, 16, 20]
    step = min(numbers, key=lambda step: (-numbers[step], step))
    assert best == {"step": step, "metric": "AP", "value": numbers[step]}
    aligndet("evaluate", "-w", ".", "--set", "plots=false")
    told = aligndet("evaluate", "-w", ".", "--weights", "best", "--set", "plots=false", "--json").json()
    found = {folder.name: json.loads((folder / "metrics.json").read_text()) for folder in (here / "evaluate").iterdir()}
    assert set(found) == {f"{run.name}-val", f"{run.name}-best-val"} and told["folder"].endswith("-best-val")
    assert found[f"{run.name}-best-val"]["AP"] == numbers[step] and found[f"{run.name}-val"]["AP"] == numbers[20]
    rows = aligndet("status", "-w", ".", "--json").json()["runs"]
    assert not [row for row in rows if row["state"] == "stale"]
    settings = [row["setting"]["evaluated"] for row in aligndet("report", "-w", ".", "--format", "json").json()["rows"]]
    assert sorted(settings) == ["val", "val, best weights"]


def test_commands_take_the_best_weights(here: Path, toy: Path) -> None:
    aligndet(*FINETUNE, "--name", "run")
    image = next((toy / "val").glob("*.jpg"))
    told = aligndet("predict", image, "-w", ".", "--run", "run", "--weights", "best", "--json").json()
    assert told["weights"].endswith("finetune/run/best.pt") and told["folder"].endswith("predict/run-best")
    by_file = aligndet("predict", image, "-w", ".", "--weights", "finetune/run/best.pt", "--force", "--json").json()
    assert by_file["per_class"] == told["per_class"] and by_file["folder"] == told["folder"]
    aligndet("export", "-w", ".", "--weights", "best")
    exported = torch.load(here / "run-best-mmdet.pth", weights_only=True)["state_dict"]
    best = read_detector(here / "finetune" / "run" / "best.pt").state_dict
    assert torch.equal(exported["bbox_head.retina_cls.weight"], best["class_predictor.weight"])
    aligndet("export", "-w", ".", "--weights", "newest", code=2)


def test_without_evaluations_there_are_no_best_weights(chain: Path) -> None:
    for command in ("evaluate", "export"):
        line = aligndet(command, "-w", chain, "--weights", "best", code=2).error_line()
        assert "has no best.pt; finetune --evaluate-every keeps one" in line
    assert (
        "--early-stop: needs --evaluate-every"
        in aligndet("finetune", "-w", chain, "--early-stop", "1", "--dry-run", code=2).error_line()
    )


def test_an_early_stop_ends_like_any_run(here: Path) -> None:
    ran = aligndet(*FINETUNE, "--early-stop", "1", "--lr", "1e-9")  # nothing is learned, so nothing gets better
    run = run_of(here)
    assert_stopped_rightly(run)
    assert f"stopped early at step {result_of(run)['steps']} of 20: 1 evaluation without a better AP" in ran.stderr
    assert (run / "weights.pt").exists() and (run / "best.pt").exists() and not (run / "resume").exists()
    assert aligndet(*FINETUNE, "--early-stop", "1", "--lr", "1e-9").stdout.startswith("already complete")


def test_the_average_is_evaluated_and_kept_and_raw_weights_only_in_checkpoints(here: Path) -> None:
    aligndet(*FINETUNE, "--name", "raw")
    aligndet(*FINETUNE, "--name", "averaged", "--ema", "0.9")
    raw, averaged = (here / "finetune" / name for name in ("raw", "averaged"))
    ours, theirs = (read_detector(run / "weights.pt").state_dict for run in (averaged, raw))
    assert ours.keys() == theirs.keys()
    name = "class_predictor.weight"
    assert not torch.equal(ours[name], theirs[name]) and torch.isfinite(ours[name]).all()
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (raw, averaged)]
    # Training is the same: only what is evaluated differs.
    losses = [[line for line in run if "lr" in line] for run in lines]
    assert losses[0] == losses[1] and logged(raw) != logged(averaged)
    aligndet("evaluate", "-w", ".", "--run", "averaged", "--set", "plots=false")
    [metrics] = [json.loads(file.read_text()) for file in (here / "evaluate").glob("averaged-*/metrics.json")]
    assert metrics["AP"] == logged(averaged)[20]


def assert_stopped_rightly(run: Path) -> None:
    """The first evaluation that is no better than the best before was the last one."""
    numbers, result = list(logged(run).items()), result_of(run)
    for place, (step, value) in enumerate(numbers[1:], start=1):
        best_step, best = max(numbers[:place], key=lambda entry: (entry[1], -entry[0]))
        assert (value <= best) == (step == numbers[-1][0])
    assert (result["steps"], result["planned_steps"], result["best"]["step"]) == (numbers[-1][0], 20, best_step)


def assert_continued_alike(forks: ForkServer, before: Path, *words: str, moments: tuple[int, ...]) -> Path:
    """Run the command, and again killed at moments of the work and continued; return the folder of the first."""
    whole = before.with_name("whole")
    shutil.copytree(before, whole)
    assert forks.run(*FINETUNE, *words, cwd=whole) == 0, forks.output
    for moment in moments:
        assert forks.run(*FINETUNE, *words, cwd=before, die_at=moment) == -signal.SIGKILL, forks.output
    assert forks.run(*FINETUNE, *words, cwd=before) == 0, forks.output
    assert_same_results(before / "finetune", whole / "finetune")
    assert result_of(run_of(before)) == result_of(run_of(whole))
    return run_of(whole)


@pytest.mark.parametrize("words", [EMA, ("--early-stop", "2", "--lr", "1e-9")])
def test_killed_and_continued_it_ends_with_the_same_bytes(
    forks: ForkServer, before: Path, words: tuple[str, ...]
) -> None:
    run = assert_continued_alike(forks, before, *words, moments=(25, 12))
    assert "best.pt" in files_of(run)


@pytest.mark.slow
def test_two_processes_stop_in_the_same_step_and_continue_alike(forks: ForkServer, before: Path) -> None:
    words = (*FINETUNE, "--ema", "0.9", "--early-stop", "1", "--lr", "1e-9")
    whole = before.with_name("whole")
    shutil.copytree(before, whole)
    assert forks.join(*words, cwd=whole)[0] == [0, 0]
    result = result_of(run_of(whole))
    assert_stopped_rightly(run_of(whole))
    pids = [forks.start(*words, cwd=before, environment=variables) for variables in torchrun_variables()]
    for _ in range(3000):
        if any((before / "finetune").glob(".*.partial/resume/step-*.pt")):
            break
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGTERM)
    assert [forks.wait(pid) for pid in pids] == [75, 75]
    assert forks.join(*words, cwd=before)[0] == [0, 0]
    assert_same_results(before / "finetune", whole / "finetune")
    assert result_of(run_of(before)) == result
