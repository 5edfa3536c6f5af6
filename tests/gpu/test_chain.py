"""All commands in order on a GPU, and what their result finds there and on a CPU."""

import json
import math
from pathlib import Path

import pytest

from helpers.commandline import aligndet, run_chain
from helpers.gpu import ACCELERATOR

RUN = "retinanet-resnet18"


@pytest.fixture(scope="module")
def workspace(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "workspace"
    computing = ("cluster", "pretrain-box", "finetune", "evaluate")
    more = {stage: (*ACCELERATOR, "--num-workers", "1") for stage in computing}
    more["finetune"] += ("--precision", "bf16-mixed", "--set", "training.log_every=1")
    run_chain(toy, folder, more=more)
    return folder


def test_the_chain(workspace: Path) -> None:
    for stage in ("pretrain-box", "finetune"):
        lines = [json.loads(line) for line in (workspace / stage / RUN / "metrics.jsonl").read_text().splitlines()]
        assert lines and all(math.isfinite(value) for line in lines for value in line.values())
    (metrics,) = (workspace / "evaluate").glob("*/metrics.json")
    assert 0 <= json.loads(metrics.read_text())["AP"] <= 1
    speed = json.loads((workspace / "finetune" / RUN / "speed.jsonl").read_text().splitlines()[-1])
    assert speed["memory_mib"] > 10


def test_evaluating_and_predicting_find_what_a_cpu_finds(toy: Path, workspace: Path, tmp_path: Path) -> None:
    found = []
    for device in (ACCELERATOR, ("--accelerator", "cpu")):
        words = ("--run", RUN, "--score", "0.005", "--no-annotated", "--batch-size", "4")
        output = tmp_path / "-".join((*device, str(len(found))))
        aligndet("predict", toy / "val", "-w", workspace, *words, *device, "--output", output)
        found.append(json.loads((output / "predictions.json").read_text())["annotations"])
    ours, theirs = found
    assert len(theirs) > 20 and abs(len(ours) - len(theirs)) <= 0.02 * len(theirs)
    # No GPU has run this yet. After six steps all scores are nearly equal, and suppression keeps other boxes where
    # an IoU is at its limit: with outputs that differ by 1e-5 on a CPU, 95.5 % were twins. If a GPU fails here for that
    # reason, compare what goes into suppression.
    assert sum(any(is_twin(one, other) for one in ours) for other in theirs) >= 0.97 * len(theirs)


def is_twin(one: dict[str, object], other: dict[str, object]) -> bool:
    same = all(one[key] == other[key] for key in ("image_id", "category_id"))
    return (
        same
        and one["score"] == pytest.approx(other["score"], abs=1e-3)
        and one["bbox"] == pytest.approx(other["bbox"], abs=0.1)
    )


def test_what_was_trained_here_can_be_exported(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "exported.pth"
    aligndet("export", "-w", workspace, "--run", RUN, "--to", "mmdet", "--output", file)
    assert file.stat().st_size > 1_000_000
