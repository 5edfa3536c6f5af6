"""Killed at any moment and run again, a stage leaves the same bytes as without. Issue 2, point 3."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commandline import CHAIN, files_of

if TYPE_CHECKING:
    from tests.e2e.conftest import ForkServer

pytestmark = pytest.mark.e2e

SEED = 0
# Times and paths; all else must be equal.
VARYING = {"manifest.json", "config.json", "speed.jsonl"}
# Progress is made safe as often as can be, so that there is much to resume from.
EAGER = {
    "proposals": ("--set", "chunk_images=3"),
    "pretrain-box": ("--set", "training.checkpoint.every_steps=2"),
    "finetune": ("--set", "training.checkpoint.every_steps=2"),
}
KILLED = -signal.SIGKILL


def words_of(stage: str, toy: Path) -> list[str | Path]:
    data = [toy] if stage == "proposals" else []
    return [stage, *data, "-w", ".", *CHAIN[stage], *EAGER.get(stage, ())]


@pytest.fixture
def before(request: pytest.FixtureRequest, chain: Path, tmp_path: Path) -> Path:
    """A workspace as it is before the stage that the test is about."""
    stages = list(CHAIN)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    shutil.copy(chain / "workspace.json", workspace)
    for stage in stages[: stages.index(request.node.callspec.params["stage"])]:
        shutil.copytree(chain / stage, workspace / stage)
    return workspace


def results(workspace: Path, stage: str) -> dict[str, bytes]:
    files = files_of(workspace / stage)
    return {name: content for name, content in files.items() if Path(name).name not in VARYING}


def wait_for_work(workspace: Path, stage: str) -> None:
    """Return once the stage has written something into its partial folder."""
    for _ in range(3000):
        if any((workspace / stage).glob(".*.partial/[!l.]*")):
            return
        time.sleep(0.01)
    raise AssertionError(f"{stage} wrote nothing in 30 s")


@pytest.mark.parametrize("stage", CHAIN)
def test_killed_again_and_again(forks: "ForkServer", stage: str, before: Path, chain: Path, toy: Path) -> None:
    rng = random.Random(f"{SEED} {stage}")
    expected = results(chain, stage)
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
    found = results(before, stage)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("stage", ["proposals", "pretrain-box"])
def test_sigterm_saves_and_exits_75(forks: "ForkServer", stage: str, before: Path, chain: Path, toy: Path) -> None:
    words = words_of(stage, toy)
    pid = forks.start(*words, cwd=before)
    wait_for_work(before, stage)
    for _ in range(3000):
        if any((before / stage).glob(".*.partial/resume/*")):
            break
        time.sleep(0.002)
    os.kill(pid, signal.SIGTERM)
    code = forks.wait(pid)
    assert code == 75, f"{code}\n{forks.output}"
    assert "error: stopped by SIGTERM; everything is saved: run the same command to continue" in forks.output
    assert forks.output.count("error: ") == 1 and "Traceback" not in forks.output
    assert forks.run(*words, cwd=before) == 0 and "which was interrupted" in forks.output
    assert results(before, stage) == results(chain, stage)
