"""Twenty steps of every detector in both stages: the losses are those of before, and two runs agree in every bit.

`ALIGNDET_WRITE_LOSSES=1 pytest tests/e2e/test_golden_losses.py` writes `golden_losses.json` anew, where a change of
losses is meant.
"""

import json
import os
from pathlib import Path

import pytest

from aligndet_cli.data.toy import draw_toy_data
from helpers.commandline import CHAIN, RESOLUTION, aligndet
from helpers.narrow import NARROW, narrow_backbones, narrow_words

pytestmark = pytest.mark.e2e

FILE = Path(__file__).with_name("golden_losses.json")
STEPS = 20
STAGES = {"pretrain-box": ("--backbone-weights", "none"), "finetune": ("--init", "scratch")}
# So low that a last bit stays one: with AVX2 and with AVX-512, the losses differ by 3e-7 at most.
RATE = ("--lr", "1e-4")
# Nothing is drawn from what was predicted: a last bit would decide what is drawn.
CERTAIN = {
    "faster-rcnn": ("rpn_samples=9999", "roi_samples=9999"),
    "mask-rcnn": ("rpn_samples=9999", "roi_samples=9999"),
    "cascade-mask-rcnn": ("rpn_samples=9999", "roi_samples=9999"),
    "htc": ("rpn_samples=9999", "roi_samples=9999"),
    "detr": ("dropout=0",),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    draw_toy_data(folder / "toy", seed=0, num_train=8, num_val=4, size_hw=(96, 120))
    with narrow_backbones:
        for stage in ("proposals", "cluster"):
            aligndet(stage, *([folder / "toy"] if stage == "proposals" else []), "-w", folder / "w", *CHAIN[stage])
    return folder / "w"


def train(workspace: Path, stage: str, detector: str, name: str) -> tuple[list[dict[str, float]], bytes]:
    """Return the losses of every step and the weights file."""
    words = (stage, "-w", workspace, *narrow_words(detector, *CERTAIN.get(detector, ())), *STAGES[stage], *RATE)
    words += (*RESOLUTION, "--steps", str(STEPS), "--batch-size", "2", "--set", "training.log_every=1", "--name", name)
    with narrow_backbones:
        aligndet(*words)
    folder = workspace / stage / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [{key: value for key, value in line.items() if key.startswith("loss")} for line in lines]
    return losses, (folder / "weights.pt").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("detector", NARROW)
def test_losses(workspace: Path, detector: str, stage: str) -> None:
    losses, weights = train(workspace, stage, detector, f"{detector}-1")
    assert train(workspace, stage, detector, f"{detector}-2") == (losses, weights)
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    columns = {name: [float(f"{step[name]:.7g}") for step in losses] for name in losses[0]}
    if os.environ.get("ALIGNDET_WRITE_LOSSES"):
        content.setdefault(detector, {})[stage] = columns
        FILE.write_text(json.dumps(content, indent=1) + "\n")
    expected = content[detector][stage]
    assert columns.keys() == expected.keys() and all(len(column) == STEPS for column in columns.values())
    for name, column in columns.items():
        assert column == pytest.approx(expected[name], rel=1e-4), f"{name}: on purpose? then write the file anew"
