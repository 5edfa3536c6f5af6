"""A step of several processes is repeated in one."""

import json
from pathlib import Path

import pytest

from helpers.commandline import CHAIN, aligndet
from helpers.forks import ForkServer
from helpers.interrupting import workspace_before


@pytest.mark.e2e
@pytest.mark.slow
def test_the_processes_of_a_run_are_repeated_one_after_the_other(
    forks: ForkServer, chain: Path, tmp_path: Path
) -> None:
    workspace = workspace_before("finetune", chain, tmp_path / "workspace")
    words = (*CHAIN["finetune"], "--batch-size", "4", "--lr", "1e12", "--name", "bad")
    two = ("--accelerator", "cpu", "--devices", "2")
    assert forks.run("finetune", "-w", ".", *words, *two, cwd=workspace) == 1, forks.output
    told = aligndet("replay", "-w", workspace, "--json").json()
    recorded = json.loads((workspace / "finetune" / ".bad.partial" / "diverged.json").read_text())
    assert len(told["losses"]) == 2 and len(told["images"]) == 4
    for now, then in zip(told["losses"], recorded["ranks"], strict=True):
        assert {name: loss["now"] for name, loss in now.items()} == then["losses"]
