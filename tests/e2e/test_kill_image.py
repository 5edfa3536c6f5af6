"""Methods of `pretrain-image`: killed at any moment and run again they leave the same bytes as without, queues and
momentum copies included; two processes have the same weights.
"""

import random
import signal
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from aligndet_cli.data.toy import draw_toy_objects
from helpers.commandline import assert_same_results
from helpers.forks import ForkServer
from helpers.two_ranks import assert_ranks_agree

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
def test_two_processes_agree(forks: ForkServer, method: str, tmp_path: Path) -> None:
    codes, outputs = forks.join(*words_of(method, tmp_path), "--steps", "3", cwd=tmp_path, keep=tmp_path)
    assert codes == [0, 0], outputs
    assert_ranks_agree(tmp_path)
