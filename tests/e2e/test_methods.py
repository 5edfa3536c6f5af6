"""Methods of pre-training beside AlignDet's: killed and resumed, in two processes, and then fine-tuned."""

import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet_cli import driver
from aligndet_cli.processes.devices import Devices
from aligndet_cli.processes.launch import Shown, launch
from helpers.commandline import BACKBONE, NECK, RANDOM, RESOLUTION, aligndet, assert_same_results
from helpers.forks import ForkServer
from helpers.interrupting import EAGER, workspace_before
from helpers.two_ranks import run_and_keep

pytestmark = pytest.mark.e2e

SMALL_DETR = (
    *("--set", "detector.hidden_dim=32", "--set", "detector.num_heads=4", "--set", "detector.encoder_layers=1"),
    *("--set", "detector.decoder_layers=2", "--set", "detector.feedforward_dim=48", "--set", "detector.num_queries=20"),
)
SQUARE = ("--short-side", "64", "--set", "projector.hidden_dim=32", "--set", "projector.embedding_dim=16")
WORDS: dict[str, tuple[str, ...]] = {
    "classes": ("--detector", "retinanet", *NECK, *RESOLUTION),
    "detreg": ("--detector", "detr", *SMALL_DETR, *RESOLUTION),
    "up-detr": ("--detector", "detr", *SMALL_DETR, *RESOLUTION),
    "soco": ("--detector", "faster-rcnn", *NECK, "--set", "detector.head_features=32", *SQUARE),
}


def words_of(method: str) -> tuple[str, ...]:
    return ("pretrain-box", "-w", ".", "--method", method, *WORDS[method], *BACKBONE, *RANDOM, "--steps", "4")


@pytest.fixture(params=WORDS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def test_killed_it_goes_on_to_the_same_results(forks: ForkServer, method: str, chain: Path, tmp_path: Path) -> None:
    workspace = workspace_before("pretrain-box", chain, tmp_path / "w")
    command = (*words_of(method), "--batch-size", "2", *EAGER["pretrain-box"])
    runs = workspace / "pretrain-box"
    assert forks.run(*command, "--name", "whole", cwd=workspace) == 0, forks.output
    killed = forks.run(*command, "--name", "killed", cwd=workspace, die_at=12)
    assert killed == -signal.SIGKILL and not (runs / "killed").exists()
    assert forks.run(*command, "--name", "killed", cwd=workspace) == 0, forks.output
    assert "which was interrupted" in forks.output
    assert_same_results(runs / "killed", runs / "whole")
    assert (runs / "whole" / "plots" / "views.jpg").exists() and (runs / "whole" / "plots" / "curves.png").exists()
    # All that was trained arrives in fine-tuning; only what is made for the classes, or was not trained, starts afresh.
    family, steps = WORDS[method][1], ("--steps", "1", "--batch-size", "2")
    tuned = ("finetune", "-w", ".", "--detector", family, *RESOLUTION, *steps, "--init", runs / "whole" / "weights.pt")
    assert forks.run(*tuned, cwd=workspace) == 0, forks.output
    [folder] = (workspace / "finetune").iterdir()
    assert json.loads((folder / "load_report.json").read_text())["matched_share"] == 1.0


def test_two_processes_agree(method: str, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = workspace_before("pretrain-box", chain, tmp_path / "w")

    def launch_and_keep(_run: object, plan: Any, devices: Devices, shown: Shown) -> None:
        launch(functools.partial(run_and_keep, stage="pretrain-box", folder=tmp_path), plan, devices, shown)

    monkeypatch.setattr(driver, "launch", launch_and_keep)
    monkeypatch.chdir(workspace)
    aligndet(*words_of(method), "--batch-size", "4", "--accelerator", "cpu", "--devices", "2")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert [name for name, value in ranks[0].items() if not torch.equal(value, ranks[1][name])] == []
