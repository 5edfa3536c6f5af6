"""Two gloo processes on the CPU: the same weights on both, those of averaged gradients. Issue 2, point 8."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from commandline import CHAIN, aligndet, files_of
from two_ranks import Taken, run_and_keep, take_learner, train_with_averaged_gradients

from aligndet_cli import driver
from aligndet_cli.training.launch import Devices, Process, Shown, launch

if TYPE_CHECKING:
    from tests.e2e.conftest import ForkServer

pytestmark = pytest.mark.e2e

TWO = ("--accelerator", "cpu", "--devices", "2")
# Two images per process: batch norm cannot do with one where the smallest map is a single cell.
BATCH = ("--batch-size", "4", "--steps", "3")
TRAINED = ("pretrain-box", "finetune")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ALIGNDET_OFFLINE": "1"}
VARYING = {"manifest.json", "config.json", "speed.jsonl"}


class Enough(Exception):
    pass


@pytest.fixture(scope="module")
def workspace(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(chain, tmp_path_factory.mktemp("two") / "workspace"))


def results(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if Path(name).name not in VARYING}


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
    """Joined instead of spawned, the two processes leave the same files (the test above made `two`)."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--nproc-per-node", "2", "-m", "aligndet_cli.cli", "finetune", "-w", workspace]
    command += [*CHAIN["finetune"], *BATCH, "--name", "joined", "--json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("schema_version") == 1  # only rank 0 speaks
    assert results(workspace / "finetune" / "joined") == results(workspace / "finetune" / "two")


def join(forks: "ForkServer", *words: str | Path, cwd: Path) -> tuple[list[int], list[str]]:
    """Run a command twice, with the variables that torchrun sets; exit codes and outputs by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = ("0", "1")
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = [forks.start(*words, cwd=cwd, environment={**where, "RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]
    return [forks.wait(pid) for pid in pids], [Path(f"{forks.log}{rank}").read_text() for rank in ranks]


def test_joined_pretraining(forks: "ForkServer", workspace: Path) -> None:
    words = ("pretrain-box", "-w", workspace, *CHAIN["pretrain-box"], *BATCH, "--name", "joined")
    codes, outputs = join(forks, *words, cwd=workspace)
    assert codes == [0, 0], outputs
    assert results(workspace / "pretrain-box" / "joined") == results(workspace / "pretrain-box" / "two")
    # Asked again: both say nothing but that it is complete, and neither waits for the other.
    codes, outputs = join(forks, *words, cwd=workspace)
    assert codes == [0, 0] and "already complete" in outputs[0] and outputs[1] == ""


def test_joined_proposals_are_written_once(forks: "ForkServer", toy: Path, chain: Path, tmp_path: Path) -> None:
    words = ("proposals", toy, "-w", tmp_path / "w", *CHAIN["proposals"])
    codes, outputs = join(forks, *words, cwd=tmp_path)
    assert codes == [0, 0], outputs
    assert results(tmp_path / "w" / "proposals") == results(chain / "proposals")


def test_a_mistake_of_joined_processes(forks: "ForkServer", workspace: Path) -> None:
    codes, outputs = join(forks, "finetune", "-w", workspace, "--init", "nil", cwd=workspace)
    assert codes == [2, 2]
    for output in outputs:
        assert "Traceback" not in output
        assert output.strip().splitlines()[-1].startswith("error: --init nil: write pretrain, backbone, scratch or")


def processes_of(session: int) -> list[str]:
    """Living processes of a session, as `pid command`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = file.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, _, its_session = rest.split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(name)
    return found


def test_a_killed_rank_ends_the_command(workspace: Path, tmp_path: Path) -> None:
    words = [
        str(word) for word in ("-w", workspace, *CHAIN["pretrain-box"], *TWO, "--steps", "5000", "--name", "killed")
    ]
    words += ["--set", "training.log_every=1"]
    command = [sys.executable, "-m", "aligndet_cli.cli", "pretrain-box", *words]
    log = workspace / "pretrain-box" / ".killed.partial" / "metrics.jsonl"
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=stderr, stderr=stderr, start_new_session=True)
    for _ in range(600):
        time.sleep(0.1)
        if log.exists() and log.stat().st_size:
            break
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    ranks = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=30) == 1
    text = (tmp_path / "stderr").read_text()
    assert text.strip().splitlines()[-1].startswith("error: a training process died (rank 1 exit code -9)")
    assert text.count("error") == 1 and "Traceback" not in text, text
    for _ in range(50):
        if not processes_of(process.pid):
            break
        time.sleep(0.1)
    assert processes_of(process.pid) == []
