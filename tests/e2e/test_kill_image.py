"""`pretrain-image`, killed at any moment and run again, leaves the same bytes as without: also the queue of MoCo v2."""

import random
import signal
from pathlib import Path

import pytest

from aligndet_cli.data.toy import draw_toy_objects
from helpers.commandline import assert_same_results
from helpers.forks import ForkServer

pytestmark = pytest.mark.e2e

SMALL = ("--backbone", "resnet18", "--image-size", "32", "--batch-size", "4", "--steps", "8")
SMALL += ("--set", "embedding_dim=16", "--set", "training.log_every=1", "--set", "training.checkpoint.every_steps=1")


@pytest.mark.parametrize("method", ["simsiam", "moco-v2"])
def test_killed_again_and_again(forks: ForkServer, method: str, tmp_path: Path) -> None:
    draw_toy_objects(tmp_path / "objects", seed=0, num_train=17, num_val=11, size_hw=(40, 48))
    words = ("pretrain-image", tmp_path / "objects", "-w", ".", "--method", method, *SMALL)
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
