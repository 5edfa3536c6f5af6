"""Methods of pre-training beside AlignDet's: killed and resumed, in two processes, and then fine-tuned."""

import json
import re
import signal
from pathlib import Path

import pytest

from helpers.commandline import BACKBONE, NECK, RANDOM, RESOLUTION, assert_same_results
from helpers.forks import ForkServer
from helpers.interrupting import EAGER, workspace_before
from helpers.two_ranks import assert_ranks_agree

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
    recipe = method if method in ("soco", "up-detr") else "default"
    assert re.search(rf"^  recipe +{recipe} \(that of ", forks.output, re.MULTILINE), forks.output
    [folder] = (workspace / "finetune").iterdir()
    assert json.loads((folder / "manifest.json").read_text())["result"]["protocol"]["recipe"] == recipe
    assert json.loads((folder / "load_report.json").read_text())["matched_share"] == 1.0


def test_two_processes_agree(forks: ForkServer, method: str, chain: Path, tmp_path: Path) -> None:
    workspace = workspace_before("pretrain-box", chain, tmp_path / "w")
    codes, outputs = forks.join(*words_of(method), "--batch-size", "4", cwd=workspace, keep=tmp_path)
    assert codes == [0, 0], outputs
    assert_ranks_agree(tmp_path)
