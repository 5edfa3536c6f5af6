"""Killed at any moment and run again, a stage leaves the same bytes as without."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from helpers.commandline import CHAIN, assert_same_results
from helpers.forks import ForkServer
from helpers.interrupting import wait_for_work, words_of, workspace_before

pytestmark = pytest.mark.e2e

SEED = 0
KILLED = -signal.SIGKILL


@pytest.fixture
def before(request: pytest.FixtureRequest, chain: Path, tmp_path: Path) -> Path:
    """A workspace as it is before the stage that the test is about."""
    return workspace_before(request.node.callspec.params["stage"], chain, tmp_path / "workspace")


@pytest.mark.parametrize("stage", CHAIN)
def test_killed_again_and_again(forks: ForkServer, stage: str, before: Path, chain: Path, toy: Path) -> None:
    rng = random.Random(f"{SEED} {stage}")
    words = words_of(stage, toy)
    # First at a moment of the clock: so long after the first file is there.
    pid = forks.start(*words, cwd=before)
    wait_for_work(before, stage)
    time.sleep(rng.uniform(0, 0.5))
    os.killpg(pid, signal.SIGKILL)
    codes = [forks.wait(pid)]
    # Then at moments of the work: before the run changes the disk for the Nth time, in what the last one left. A run
    # that had less than that left to do is done, and begun anew; every unfinished one makes more than nine changes.
    for fewest, most in ((8, 30), (3, 9)):
        if codes[-1] == 0:
            shutil.rmtree(before / stage)
        codes.append(forks.run(*words, cwd=before, die_at=rng.randint(fewest, most)))
    assert codes[-1] == KILLED and set(codes) <= {0, KILLED}, f"{codes}\n{forks.output}"
    assert forks.run(*words, cwd=before) == 0, forks.output
    assert_same_results(before / stage, chain / stage)


@pytest.mark.parametrize(
    ("stage", "number"),
    [*((stage, signal.SIGTERM) for stage in CHAIN), ("proposals", signal.SIGUSR1), ("pretrain-box", signal.SIGUSR1)],
)
def test_asked_to_stop_it_saves_and_exits_75(
    forks: ForkServer, stage: str, number: signal.Signals, before: Path, chain: Path, toy: Path
) -> None:
    words = words_of(stage, toy)
    pid = forks.start(*words, cwd=before)
    wait_for_work(before, stage)
    # As `kill` does it, and as Slurm does it: to all processes of the command.
    (os.kill if number == signal.SIGTERM else os.killpg)(pid, number)
    code = forks.wait(pid)
    assert code == 75, f"{code}\n{forks.output}"
    assert f"error: stopped by {number.name}; " in forks.output
    assert forks.output.strip().endswith("run the same command to continue")
    assert forks.output.count("error: ") == 1 and "Traceback" not in forks.output
    assert forks.run(*words, cwd=before) == 0 and "which was interrupted" in forks.output
    assert_same_results(before / stage, chain / stage)
