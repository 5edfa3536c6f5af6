"""Two processes of which one dies, hangs or fails, or which are asked to stop, end in time and say why."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.commandline import CHAIN, aligndet, environment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TWO = ("--accelerator", "cpu", "--devices", "2")


@dataclass
class Running:
    """A command in a session of its own, and the file that all its processes print to."""

    command: "subprocess.Popen[bytes]"
    log: Path
    run: Path

    @property
    def ranks(self) -> list[int]:
        """Pids of the two training processes."""
        pid = self.command.pid
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        found = [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        assert len(found) == 2
        return found

    def wait_for_training(self) -> None:
        """Return once steps are being logged."""
        metrics = self.run.with_name(f".{self.run.name}.partial") / "metrics.jsonl"
        for _ in range(900):
            time.sleep(0.1)
            if metrics.exists() and metrics.stat().st_size:
                return
        raise AssertionError(self.log.read_text())

    def end(self, timeout: float = 30) -> tuple[int, str]:
        """Exit code and last line, which must be the only error, once no process is left."""
        code = self.command.wait(timeout)
        for _ in range(50):
            if not processes_of(self.command.pid):
                break
            time.sleep(0.1)
        assert processes_of(self.command.pid) == []
        text = self.log.read_text()
        assert text.count("error: ") == 1 and "Traceback" not in text, text
        return code, text.strip().splitlines()[-1]


def processes_of(session: int) -> list[str]:
    """Living processes of a session, by command."""
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


@contextmanager
def training(chain: Path, tmp_path: Path, *words: str) -> Iterator[Running]:
    workspace = tmp_path / "workspace"
    if not workspace.exists():
        shutil.copytree(chain, workspace)
    command = [sys.executable, "-m", "aligndet_cli.cli", "pretrain-box", "-w", str(workspace), *CHAIN["pretrain-box"]]
    command += [*TWO, "--steps", "5000", "--name", "two", "--set", "training.log_every=1", *words]
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment(), stdout=out, stderr=out, start_new_session=True)
    try:
        yield Running(process, log, workspace / "pretrain-box" / "two")
    finally:
        if processes_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_one_is_killed(chain: Path, tmp_path: Path) -> None:
    with training(chain, tmp_path) as running:
        running.wait_for_training()
        os.kill(running.ranks[1], signal.SIGKILL)
        code, line = running.end()
    assert code == 1 and line.startswith("error: a training process (rank 1) was killed, most likely by the system")


def test_one_hangs(chain: Path, tmp_path: Path) -> None:
    # Three seconds are enough to start in and to wait in; then the launcher gives the stopped process 30 s to end.
    with training(chain, tmp_path, "--set", "runtime.timeout_minutes=0.05") as running:
        running.wait_for_training()
        os.kill(running.ranks[1], signal.SIGSTOP)
        code, line = running.end(timeout=60)
    assert code == 1 and line.startswith("error: rank 0: waited 0.05 minutes for another process of the run, which")


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_asked_to_stop(chain: Path, tmp_path: Path, number: signal.Signals, to_all: bool) -> None:
    with training(chain, tmp_path, "--num-workers", "1") as running:
        running.wait_for_training()
        if to_all:  # as Slurm does it
            os.killpg(running.command.pid, number)
        else:
            os.kill(running.command.pid, number)
        code, line = running.end()
        assert code == 75
        assert line.startswith("error: stopped by SIG") and line.endswith("run the same command to continue")
        checkpoints = sorted((running.run.with_name(".two.partial") / "resume").glob("step-*.pt"))
        assert checkpoints
        done = int(checkpoints[-1].stem.removeprefix("step-"))
    # Another number of processes may take it up, with the same settings.
    words = ("pretrain-box", "-w", tmp_path / "workspace", *CHAIN["pretrain-box"], "--steps", "5000", "--name", "two")
    again = aligndet(*words, "--set", "training.log_every=1", "--dry-run")
    assert "would be continued" in again.stdout and done >= 1


def test_asked_to_stop_while_they_start(chain: Path, tmp_path: Path) -> None:
    with training(chain, tmp_path) as running:
        partial = running.run.with_name(".two.partial")
        for _ in range(600):
            time.sleep(0.05)
            if (partial / "lock").exists():
                break
        running.command.send_signal(signal.SIGTERM)
        code, line = running.end()
    assert code == 75 and line == "error: stopped by SIGTERM; run the same command to continue"
