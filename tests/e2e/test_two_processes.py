"""Two gloo processes on the CPU: the same weights on both, those of averaged gradients."""

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet_cli import driver
from aligndet_cli.processes.devices import Devices, Process
from aligndet_cli.processes.launch import Shown, launch
from aligndet_cli.processes.slurm import torch_variables
from helpers.commandline import CHAIN, aligndet, assert_same_results, environment
from helpers.forks import ForkServer
from helpers.two_ranks import Taken, run_and_keep, take_learner, train_with_averaged_gradients

pytestmark = pytest.mark.e2e

TWO = ("--accelerator", "cpu", "--devices", "2")
# Two images per process: batch norm cannot do with one where the smallest map is a single cell.
BATCH = ("--batch-size", "4", "--steps", "3")
TRAINED = ("pretrain-box", "finetune")


class Enough(Exception):
    pass


@pytest.fixture(scope="module")
def workspace(chain: Path, module_folder: Path) -> Path:
    return Path(shutil.copytree(chain, module_folder / "workspace"))


def spawned(stage: str, workspace: Path) -> Path:
    """The run of two processes that the command started itself: the first test makes it, or this does."""
    if not (workspace / stage / "two").exists():
        aligndet(stage, "-w", workspace, *CHAIN[stage], *BATCH, *TWO, "--name", "two")
    return workspace / stage / "two"


@pytest.mark.parametrize("stage", TRAINED)
def test_ranks_agree_and_average_their_gradients(
    stage: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (stage, "-w", workspace, *CHAIN[stage], *BATCH)

    def launch_and_keep(_run: object, plan: Any, devices: Devices, shown: Shown) -> None:
        assert devices == Devices("cpu", per_node=2)
        launch(functools.partial(run_and_keep, stage=stage, folder=tmp_path), plan, devices, shown)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "launch", launch_and_keep)
        aligndet(*words, *TWO, "--name", "two")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])

    # The same in one process: each rank's shard in turn, then the mean of the two gradients.
    taken: list[Taken] = []

    def take(_run: object, plan: Any, _devices: Devices, _shown: Shown) -> None:
        taken.extend(take_learner(plan, stage, Process(rank, world_size=2), monkeypatch) for rank in (0, 1))
        raise Enough

    with monkeypatch.context() as patch:
        patch.setattr(driver, "launch", take)
        with pytest.raises(Enough):
            aligndet(*words, "--name", "alone")
    first_images = [next(each.batches_from(0))[0].index for each in taken]
    assert first_images[0] != first_images[1]  # or the mean would prove nothing
    expected = train_with_averaged_gradients(taken)
    assert ranks[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-5, atol=1e-7, msg=name)
        assert torch.equal(value, expected[1][name])


def test_under_torchrun(workspace: Path) -> None:
    """Joined instead of spawned, the two processes leave the same files."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--nproc-per-node", "2", "-m", "aligndet_cli.cli", "finetune", "-w", workspace]
    command += [*CHAIN["finetune"], *BATCH, "--name", "joined", "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("schema_version") == 1  # only rank 0 speaks
    assert_same_results(workspace / "finetune" / "joined", spawned("finetune", workspace))


def slurm_variables() -> list[dict[str, str]]:
    """Return the variables that srun sets for each of two processes; the job is one whose port is free."""
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost,elsewhere[3-4]"}
    for job in range(os.getpid(), os.getpid() + 100):
        found = [{**step, "SLURM_JOB_ID": str(job), "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", int(torch_variables(found[0])["MASTER_PORT"])))
            return found
    raise AssertionError("no free port")


def test_joined_pretraining(forks: ForkServer, workspace: Path) -> None:
    words = ("pretrain-box", "-w", workspace, *CHAIN["pretrain-box"], *BATCH, "--name", "joined")
    codes, outputs = forks.join(*words, cwd=workspace)
    assert codes == [0, 0], outputs
    assert_same_results(workspace / "pretrain-box" / "joined", spawned("pretrain-box", workspace))
    # Asked again: both say nothing but that it is complete, and neither waits for the other.
    codes, outputs = forks.join(*words, cwd=workspace)
    assert codes == [0, 0] and "already complete" in outputs[0] and outputs[1] == ""


def test_joined_under_slurm(forks: ForkServer, workspace: Path) -> None:
    words = ("pretrain-box", "-w", workspace, *CHAIN["pretrain-box"], *BATCH, "--name", "slurm")
    codes, outputs = forks.join(*words, cwd=workspace, ranks=slurm_variables())
    assert codes == [0, 0], outputs
    assert_same_results(workspace / "pretrain-box" / "slurm", spawned("pretrain-box", workspace))
    assert "(2 cpu processes x 2)" in outputs[0] and outputs[1] == ""


def test_joined_evaluation_of_fewer_chunks_than_processes(forks: ForkServer, workspace: Path, chain: Path) -> None:
    # Five images are one chunk: the second process has nothing to do.
    words = ("evaluate", "-w", workspace, "--limit", "5")
    codes, outputs = forks.join(*words, "--name", "joined", cwd=workspace)
    assert codes == [0, 0], outputs
    assert forks.run(*words, "--name", "alone", cwd=workspace) == 0, forks.output
    assert_same_results(workspace / "evaluate" / "joined", workspace / "evaluate" / "alone")


def test_joined_proposals_are_written_once(forks: ForkServer, toy: Path, chain: Path, tmp_path: Path) -> None:
    words = ("proposals", toy, "-w", tmp_path / "w", *CHAIN["proposals"])
    codes, outputs = forks.join(*words, cwd=tmp_path)
    assert codes == [0, 0], outputs
    assert_same_results(tmp_path / "w" / "proposals", chain / "proposals")


def test_a_mistake_of_joined_processes(forks: ForkServer, workspace: Path) -> None:
    codes, outputs = forks.join("finetune", "-w", workspace, "--init", "nil", cwd=workspace)
    assert codes == [2, 2]
    for output in outputs:
        assert "Traceback" not in output
        assert output.strip().splitlines()[-1].startswith("error: --init nil: write pretrain, backbone, scratch or")
