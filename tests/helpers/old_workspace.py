"""Makes the workspace that `tests/e2e/test_old_workspace.py` keeps of an earlier commit. A script:

    git worktree add ../before COMMIT
    cd ../before; PYTHONPATH=.:REPOSITORY/tests python -m helpers.old_workspace REPOSITORY/tests/e2e/old_workspace

It has the toy set, proposals and clusters, a pre-training that was stopped after 3 of 6 steps, and a fine-tuned
detector with its evaluation. `expected.json` has the numbers of the same pre-training without a stop. Pictures are left
out.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from aligndet_cli.data.toy import draw_toy_data
from helpers.commandline import CHAIN, RESOLUTION, aligndet
from helpers.narrow import narrow_backbones, narrow_words

STOPPED_AFTER = 3
SMALL = (*narrow_words("retinanet", "neck_channels=8"), *RESOLUTION, "--batch-size", "2")
PRETRAIN = ("pretrain-box", *SMALL, "--backbone-weights", "none", "--steps", "6")
PRETRAIN += (
    "--set",
    "training.log_every=1",
    "--set",
    "projector.hidden_dim=16",
    "--set",
    "projector.embedding_dim=16",
    "--name",
    "stopped",
)
FINETUNE = ("finetune", *SMALL, "--init", "scratch", "--lr", "0.02", "--steps", "300", "--name", "done")
EVALUATE = ("evaluate", "--split", "train", "--set", "plots=false")
DATA = "@DATA@"  # in place of the folder of the data, in all that names it


def numbers_of(folder: Path) -> dict[str, Any]:
    """Return the logged losses of a pre-training by step, and the norm of every tensor that it left."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = torch.load(folder / "weights.pt", weights_only=True)
    tensors = {**weights["state_dict"], **weights["extra"]["projector"]}
    return {"metrics": lines, "norms": {name: float(value.double().norm()) for name, value in tensors.items()}}


def make(target: Path, scratch: Path) -> None:
    """Write the workspace."""
    data, workspace = scratch / "toy", scratch / "workspace"
    draw_toy_data(data, seed=0, num_train=8, num_val=4, size_hw=(96, 120))
    aligndet("proposals", data, "-w", workspace, *CHAIN["proposals"])
    aligndet("cluster", "-w", workspace, *CHAIN["cluster"])
    shutil.copytree(workspace, scratch / "whole")
    aligndet(*PRETRAIN, "-w", scratch / "whole")
    expected = numbers_of(scratch / "whole" / "pretrain-box" / "stopped")
    left = [STOPPED_AFTER]

    def stop(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_pre_hook(stop)
    aligndet(*PRETRAIN, "-w", workspace, code=75)
    handle.remove()
    aligndet(*FINETUNE, "-w", workspace)
    aligndet(*EVALUATE, "-w", workspace)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.copytree(data, target / "toy")
    leave_out = shutil.ignore_patterns("plots", "*.png", "*.jpg", "*.html", "lock")
    shutil.copytree(workspace, target / "stages", ignore=leave_out)
    for file in (target / "stages").rglob("*.json*"):
        file.write_text(file.read_text().replace(str(data), DATA))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with narrow_backbones, tempfile.TemporaryDirectory() as folder:
        make(Path(sys.argv[1]), Path(folder))
