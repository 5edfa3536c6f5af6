"""Networks of timm, a ConvNeXt and two linked ResNets as backbones: killed and resumed, and in two processes."""

import functools
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet_cli import driver
from aligndet_cli.processes.devices import Devices
from aligndet_cli.processes.launch import Shown, launch
from helpers.commandline import NECK, RANDOM, RESOLUTION, aligndet, assert_same_results
from helpers.forks import ForkServer
from helpers.interrupting import EAGER, workspace_before
from helpers.two_ranks import run_and_keep

pytestmark = pytest.mark.e2e

NAMES = ("convnext_tiny", "timm:mobilenetv3_small_100", "timm:vit_tiny_patch16_224", "cb-resnet18")


@pytest.fixture(params=NAMES)
def words(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param.startswith("timm:") and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return ("--detector", "retinanet", "--backbone", request.param, *NECK, *RESOLUTION, "--steps", "4")


def test_killed_it_goes_on_to_the_same_results(
    forks: ForkServer, words: tuple[str, ...], chain: Path, tmp_path: Path
) -> None:
    workspace = workspace_before("pretrain-box", chain, tmp_path / "w")
    pretrain = ("pretrain-box", "-w", ".", *words, *RANDOM, "--batch-size", "2", *EAGER["pretrain-box"])
    finetune = ("finetune", "-w", ".", *words, "--batch-size", "2", *EAGER["finetune"])
    for stage, command in (("pretrain-box", pretrain), ("finetune", finetune)):
        assert forks.run(*command, "--name", "whole", cwd=workspace) == 0, forks.output
        killed = forks.run(*command, "--name", "killed", cwd=workspace, die_at=12)
        assert killed == -signal.SIGKILL and not (workspace / stage / "killed").exists()
        assert forks.run(*command, "--name", "killed", cwd=workspace) == 0, forks.output
        assert "which was interrupted" in forks.output
        assert_same_results(workspace / stage / "killed", workspace / stage / "whole")


def test_two_processes_agree(
    words: tuple[str, ...], chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspace_before("pretrain-box", chain, tmp_path / "w")

    def launch_and_keep(_run: object, plan: Any, devices: Devices, shown: Shown) -> None:
        launch(functools.partial(run_and_keep, stage=stage, folder=tmp_path), plan, devices, shown)

    two = ("--batch-size", "4", "--accelerator", "cpu", "--devices", "2")
    for stage, more in (("pretrain-box", RANDOM), ("finetune", ())):
        with monkeypatch.context() as patch:
            patch.setattr(driver, "launch", launch_and_keep)
            aligndet(stage, "-w", workspace, *words, *two, *more)
        ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
        assert ranks[0].keys() == ranks[1].keys()
        assert [name for name, value in ranks[0].items() if not torch.equal(value, ranks[1][name])] == []
