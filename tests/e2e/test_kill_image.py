"""Methods of `pretrain-image`: killed at any moment and run again they leave the same bytes as without, queues and
momentum copies included; two processes have the same weights.
"""

import functools
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

from aligndet_cli import driver
from aligndet_cli.data.toy import draw_toy_objects
from aligndet_cli.processes.devices import Devices
from aligndet_cli.processes.launch import Shown, launch
from helpers.commandline import aligndet, assert_same_results
from helpers.forks import ForkServer
from helpers.two_ranks import run_and_keep

pytestmark = pytest.mark.e2e

SMALL = ("--backbone", "resnet18", "--image-size", "32", "--batch-size", "4")
DIMS = ("--set", "embedding_dim=16")
OWN = {
    "simsiam": DIMS,
    "moco-v2": DIMS,
    "byol": (*DIMS, "--set", "hidden_dim=24"),
    "dense-cl": DIMS,
    "pixpro": (*DIMS, "--set", "hidden_dim=24"),
    "distill": ("--teacher", "teacher.pth"),
}
EAGER = ("--steps", "8", "--set", "training.log_every=1", "--set", "training.checkpoint.every_steps=1")


def words_of(method: str, folder: Path) -> tuple[str | Path, ...]:
    """The command for images, and for a teacher, that are drawn into a folder."""
    draw_toy_objects(folder / "objects", seed=0, num_train=17, num_val=11, size_hw=(40, 48))
    torch.manual_seed(7)
    torch.save(resnet18().state_dict(), folder / "teacher.pth")
    own = [folder / word if word == "teacher.pth" else word for word in OWN[method]]
    return ("pretrain-image", folder / "objects", "-w", ".", "--method", method, *SMALL, *own)


@pytest.mark.parametrize("method", OWN)
def test_killed_again_and_again(forks: ForkServer, method: str, tmp_path: Path) -> None:
    words = (*words_of(method, tmp_path), *EAGER)
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    whole.mkdir()
    interrupted.mkdir()
    assert forks.run(*words, cwd=whole) == 0, forks.output
    changes, rng = forks.changes, random.Random(method)
    # Before the first checkpoint, in the middle, and in what is left from there.
    for die_at in (rng.randint(5, 12), rng.randint(changes // 3, changes // 2), rng.randint(15, 30)):
        assert forks.run(*words, cwd=interrupted, die_at=die_at) == -signal.SIGKILL, forks.output
    assert forks.run(*words, cwd=interrupted) == 0 and "continuing after step" in forks.output, forks.output
    run = Path("pretrain-image", f"{method}-resnet18")
    assert (interrupted / run / "weights.pt").exists()
    assert_same_results(interrupted / run, whole / run)


@pytest.mark.parametrize("method", OWN)
def test_two_processes_agree(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*words_of(method, tmp_path), "--steps", "3", "--accelerator", "cpu", "--devices", "2")

    def launch_and_keep(_run: object, plan: Any, devices: Devices, shown: Shown) -> None:
        launch(functools.partial(run_and_keep, stage="pretrain-image", folder=tmp_path), plan, devices, shown)

    monkeypatch.setattr(driver, "launch", launch_and_keep)
    monkeypatch.chdir(tmp_path)
    aligndet(*words)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert [name for name, value in ranks[0].items() if not torch.equal(value, ranks[1][name])] == []
