"""What the tests and the benchmarks that interrupt stages share."""

import os
import shutil
import signal
import time
from pathlib import Path

from helpers.commandline import CHAIN
from helpers.forks import ForkServer

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


def end_in_time(forks: ForkServer, pid: int, deadline_s: float = 300) -> int | None:
    """Exit code of a command; None if it hangs, after it was killed."""
    until = time.monotonic() + deadline_s
    while not forks.has_ended(pid):
        if time.monotonic() > until:
            os.killpg(pid, signal.SIGKILL)
            forks.wait(pid)
            return None
        time.sleep(0.02)
    return forks.wait(pid)


def error_lines(output: str) -> list[str]:
    """The errors that a command told."""
    return [line for line in output.splitlines() if line.startswith("error: ")]


def told_badly(code: int | None, expected: set[int], output: str) -> list[str]:
    """What is wrong with the end of a command, if anything: an error is one line, which `kill -9` may follow."""
    lines = error_lines(output)
    is_told = len(lines) == (code > 0) if code is not None and code >= 0 else len(lines) <= 1
    is_well = code in expected and is_told and "Traceback" not in output
    return [] if is_well else [f"exit code {code}, {len(lines)} lines of error: {output}"]
