"""What the tests and the benchmark that interrupt stages share."""

import shutil
import time
from pathlib import Path

from helpers.commandline import CHAIN

# Progress is made safe as often as can be, so that there is much to resume from.
EAGER = {
    "pretrain-box": ("--set", "training.checkpoint.every_steps=2"),
    "finetune": ("--set", "training.checkpoint.every_steps=2"),
}


def words_of(stage: str, toy: Path) -> list[str | Path]:
    """The command of a stage, to be run in the workspace."""
    data = [toy] if stage == "proposals" else []
    return [stage, *data, "-w", ".", *CHAIN[stage], *EAGER.get(stage, ())]


def workspace_before(stage: str, chain: Path, workspace: Path) -> Path:
    """Make `workspace` what it is before a stage, from one in which all have run."""
    workspace.mkdir()
    shutil.copy(chain / "workspace.json", workspace)
    stages = list(CHAIN)
    for earlier in stages[: stages.index(stage)]:
        shutil.copytree(chain / earlier, workspace / earlier)
    return workspace


def wait_for_work(workspace: Path, stage: str) -> None:
    """Return once the stage has begun to write into its partial folder, so that another run would resume it."""
    for _ in range(3000):
        if any((workspace / stage).glob(".*.partial/manifest.json")):
            return
        time.sleep(0.01)
    raise AssertionError(f"{stage} wrote nothing in 30 s")
