"""A pre-trained detector in a module of Lightning (examples/lightning_loop.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import aligndet_cli as aligndet
from helpers.scripts import EXAMPLES


@pytest.mark.slow
def test_the_example_trains_and_its_weights_predict(toy: Path, chain: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    words = [chain / "pretrain-box" / "retinanet-resnet18", toy, "--split", "train", "--num-classes", "12"]
    words += ["--short-side", "64", "--epochs", "1", "--batch-size", "4", "--output", tmp_path / "weights.pt"]
    # a process of its own: Lightning changes warnings, signals and threads of the one that it is in
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "lightning_loop.py", *map(str, words)],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "loss_cls" in ran.stdout and "loss_box_reg" in ran.stdout
    detector = aligndet.load(tmp_path / "weights.pt")
    assert len(detector.names) == 11
    (found,) = detector.predict(toy / "val" / "000000.jpg", score=0.0)
    assert found.keys() == {"boxes", "labels", "scores"}
