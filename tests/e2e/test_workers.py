"""The same files for any number of loader processes and however often a run was killed, with images of both shapes."""

from pathlib import Path

import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from aligndet_cli.data.toy import draw_toy_data
from helpers.commandline import CHAIN, aligndet, assert_same_results
from helpers.forks import ForkServer
from helpers.interrupting import EAGER

pytestmark = pytest.mark.e2e

KILLED = -9


def test_batches_do_not_depend_on_workers_or_kills(forks: ForkServer, tmp_path: Path) -> None:
    data = tmp_path / "data"
    draw_toy_data(data, seed=0, num_train=13, num_val=3, size_hw=(100, 102))
    is_wide = open_images(DataConfig(root=data), purpose="train").aspects(range(13)) > 1
    assert 3 < is_wide.sum() < 10
    words = ("finetune", data, "--init", "scratch", *CHAIN["finetune"], *EAGER["finetune"])
    words = (*words, "--batch-size", "4", "--steps", "8", "--name", "run")
    for workers in range(3):
        aligndet(*words, "-w", tmp_path / str(workers), "--num-workers", str(workers))
    assert (tmp_path / "0" / "finetune" / "run" / "weights.pt").exists()
    assert forks.run(*words, "-w", "killed", "--num-workers", "1", cwd=tmp_path, die_at=20) == KILLED, forks.output
    assert not (tmp_path / "killed" / "finetune" / "run").exists()
    assert forks.run(*words, "-w", "killed", "--num-workers", "1", cwd=tmp_path) == 0, forks.output
    assert "continuing after step" in forks.output
    for name in ("1", "2", "killed"):
        assert_same_results(tmp_path / name / "finetune", tmp_path / "0" / "finetune")
