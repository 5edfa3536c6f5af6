"""A run that waits, for images or for other processes, ends in time when it is asked to, and says why it cannot go on.

Every command has 30 s to end after what is done to it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.commandline import CHAIN, environment
from helpers.forks import ForkServer

pytestmark = pytest.mark.e2e

DEADLINE_S = 30
TWO = ("--accelerator", "cpu", "--devices", "2", "--batch-size", "4")
FINETUNE = ("finetune", "--init", "scratch", *CHAIN["finetune"], "--name", "run")


# Lines of Python, to run before a command: who reads an image waits while the file `stall` is there, as for a disk
# that has gone.
STALLED = """
import pathlib, time
import aligndet_cli.data.loaders, aligndet_cli.proposals.work
def stalling(read):
    def read_or_stall(*arguments):
        while pathlib.Path("stall").exists():
            pathlib.Path("stalled").touch()
            time.sleep(0.1)
        return read(*arguments)
    return read_or_stall
aligndet_cli.data.loaders.read_image = stalling(aligndet_cli.data.loaders.read_image)
aligndet_cli.proposals.work.read_bytes = stalling(aligndet_cli.proposals.work.read_bytes)
"""


@contextlib.contextmanager
def command(
    *words: str | Path, cwd: Path, before: str = "", prefix: tuple[str, ...] = (), **variables: str
) -> Iterator["subprocess.Popen[str]"]:
    """Start a command in a new process and session, as its script does; end all of it with the block.

    Args:
        before: lines of Python to run first.
        prefix: words of the program that starts it.
    """
    script = cwd / "script" / "aligndet"  # in a folder of its own, which is first on the path
    script.parent.mkdir(exist_ok=True)
    script.write_text(
        f"import os, signal\n{before}\nfrom aligndet_cli.cli import main\nif __name__ == '__main__':\n    main()\n"
    )
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [*prefix, sys.executable, str(script), *map(str, words)],
        cwd=cwd,
        env=environment(PYTHONPATH=root, **variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and last line of a command that is about to end; the line is the only error."""
    _, text = process.communicate(timeout=DEADLINE_S)
    assert "Traceback" not in text and text.count("error: ") <= 1, text
    return process.returncode, text.strip().splitlines()[-1] if text.strip() else ""


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


@dataclass(frozen=True)
class Started:
    """A command of the fork server."""

    forks: ForkServer
    pid: int
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output or self.has_ended())
        assert text in self.output, self.output

    def has_ended(self) -> bool:
        return self.forks.has_ended(self.pid)

    def end(self) -> tuple[int, str]:
        """Exit code and last line of the command, whose only error it is; it is killed after the deadline."""
        until = time.monotonic() + DEADLINE_S
        while not self.has_ended():
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                self.forks.wait(self.pid)
                raise AssertionError(f"still alive: {self.output}")
            time.sleep(0.05)
        code, text = self.forks.wait(self.pid), self.output
        assert "Traceback" not in text and text.count("error: ") <= 1, text
        return code, text.strip().splitlines()[-1] if text.strip() else ""


def start(forks: ForkServer, *words: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> Started:
    own = environment or {}
    log = Path(f"{forks.log}{own.get('RANK') or own.get('SLURM_PROCID') or ''}")
    log.unlink(missing_ok=True)  # of the command before
    return Started(forks, forks.start(*words, cwd=cwd, environment=own), log)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def last_checkpoint(workspace: Path) -> int:
    """Number of steps of the newest checkpoint of the run."""
    files = (workspace / "finetune" / ".run.partial" / "resume").glob("step-*.pt")
    return max(int(file.stem.removeprefix("step-")) for file in files)


def with_shared_memory(mount: str) -> tuple[str, ...]:
    """Words that start a program with another /dev/shm."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this sandbox does not let a process have mounts of its own")
    return ("unshare", "-m", "bash", "-c", mount + 'exec "$@"', "bash")


SMALL_SHM = "mount -t tmpfs -o size=64m tmpfs /dev/shm; "
FULL_SHM = "mount -t tmpfs -o size=64k tmpfs /dev/shm; head -c 64k /dev/zero > /dev/shm/full; "


@pytest.mark.parametrize("mount", [SMALL_SHM, FULL_SHM], ids=["64m", "full"])
def test_shared_memory_may_be_small_or_full(mount: str, toy: Path, tmp_path: Path) -> None:
    prefix = with_shared_memory(mount)
    with command(*FINETUNE, toy, "-w", "ws", "--num-workers", "2", cwd=tmp_path, prefix=prefix) as process:
        code, line = ended(process)
    assert code == 0, line


@pytest.mark.parametrize(("backend", "expected"), [("processes", 1), ("threads", 0)])
def test_proposals_with_full_shared_memory(backend: str, expected: int, toy: Path, tmp_path: Path) -> None:
    words = ("proposals", toy, "-w", "ws", *CHAIN["proposals"], "--num-workers", "2", "--backend", backend)
    with command(*words, cwd=tmp_path, prefix=with_shared_memory(FULL_SHM)) as process:
        code, line = ended(process)
    assert code == expected, line
    assert line.startswith("error: joblib can start no processes here") == (expected == 1), line


def test_the_temporary_folder_may_have_a_long_path(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 110)
    folder.mkdir()
    words = (*FINETUNE, toy, "-w", "ws", "--num-workers", "2")
    with command(*words, cwd=tmp_path, TMPDIR=str(folder)) as process:
        code, line = ended(process)
    assert code == 0, line


def test_files_of_the_current_folder_do_not_hide_modules_from_helper_processes(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "types.py").write_text("raise SystemExit(1)\n")
    words = ("proposals", toy, "-w", "ws", *CHAIN["proposals"], "--num-workers", "2", "--backend", "processes")
    with command(*words, cwd=tmp_path) as process:
        code, line = ended(process)
    assert code == 0, line


@contextlib.contextmanager
def training(folder: Path, data: Path, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a run that waits for images after some steps."""
    more = ("--steps", "5000", "--set", "training.log_every=1", *words)
    with command(*FINETUNE, data, "-w", "ws", *more, cwd=folder, before=STALLED) as process:
        metrics = folder / "ws" / "finetune" / ".run.partial" / "metrics.jsonl"
        wait_until(lambda: (metrics.exists() and metrics.stat().st_size > 0) or process.poll() is not None)
        (folder / "stall").touch()
        wait_until(lambda: is_settled(metrics) or process.poll() is not None)
        yield process


def steps_of(folder: Path) -> int:
    return len((folder / "ws" / "finetune" / ".run.partial" / "metrics.jsonl").read_text().splitlines())


def is_settled(file: Path) -> bool:
    """Return True if a file has not changed for two seconds."""
    return file.exists() and file.stat().st_size > 0 and time.time() - file.stat().st_mtime > 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_a_line(number: signal.Signals, toy: Path, tmp_path: Path) -> None:
    with training(tmp_path, toy, "--num-workers", "2") as process:
        os.kill(children_of(process.pid)[-1], number)
        code, line = ended(process)
    told = "was killed, most likely by the system" if number == signal.SIGKILL else "crashed (SIGSEGV)"
    assert code == 1 and line.startswith(f"error: a process that reads images {told}"), line


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_training_that_waits_for_images_saves_and_stops(
    workers: str, number: signal.Signals, expected: int, toy: Path, tmp_path: Path
) -> None:
    with training(tmp_path, toy, "--num-workers", workers) as process:
        steps = steps_of(tmp_path)
        process.send_signal(number)
        code, line = ended(process)
    assert code == expected, line
    if expected == 75:
        assert line == f"error: stopped by {number.name}; run the same command to continue"
    assert last_checkpoint(tmp_path / "ws") == steps > 0


@pytest.mark.parametrize(("second", "expected"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_second_signal_ends_what_the_first_one_did_not(
    second: signal.Signals, expected: int, chain: Path, tmp_path: Path
) -> None:
    """Without workers, `evaluate` finishes the images it has begun with; here that never ends."""
    shutil.copytree(chain, tmp_path / "ws")
    (tmp_path / "stall").touch()
    words = ("evaluate", "-w", "ws", "--num-workers", "0", "--name", "stuck")
    with command(*words, cwd=tmp_path, before=STALLED) as process:
        wait_until(lambda: (tmp_path / "ws" / "evaluate" / ".stuck.partial" / "resume").exists())
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(second)
        code, line = ended(process)
    assert code == expected, line


def test_proposals_that_wait_for_an_image_stop(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "stall").touch()
    words = ("proposals", toy, "-w", "ws", *CHAIN["proposals"], "--num-workers", "2", "--backend", "threads")
    with command(*words, cwd=tmp_path, before=STALLED) as process:
        wait_until((tmp_path / "stalled").exists)
        process.send_signal(signal.SIGTERM)
        code, line = ended(process)
    assert (code, line) == (75, "error: stopped by SIGTERM; run the same command to continue")


@pytest.mark.parametrize("words", [("predict", "toy"), ("cluster", "--name", "stuck"), ("evaluate", "--name", "stuck")])
def test_other_commands_that_wait_for_images_stop(
    words: tuple[str, ...], chain: Path, toy: Path, tmp_path: Path
) -> None:
    shutil.copytree(chain, tmp_path / "ws")
    (tmp_path / "stall").touch()
    (tmp_path / "toy").symlink_to(toy / "val")
    more = CHAIN.get(words[0], ())
    with command(*words, *more, "-w", "ws", "--num-workers", "1", cwd=tmp_path, before=STALLED) as process:
        wait_until((tmp_path / "stalled").exists)
        process.send_signal(signal.SIGTERM)
        code, line = ended(process)
    assert (code, line) == (75, "error: stopped by SIGTERM; run the same command to continue")


HALVES = (
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is empty"),
)


@pytest.mark.parametrize(("variables", "problem"), HALVES)
def test_half_a_launcher_is_a_line(
    variables: dict[str, str], problem: str, forks: ForkServer, toy: Path, tmp_path: Path
) -> None:
    code, line = start(forks, *FINETUNE, toy, "-w", "ws", cwd=tmp_path, environment=variables).end()
    assert code == 2 and problem in line and "env -u RANK -u WORLD_SIZE aligndet" in line, line


SHELL = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "localhost",
}


def test_processes_that_never_come_are_told(forks: ForkServer, toy: Path, tmp_path: Path) -> None:
    words = (*FINETUNE, toy, "-w", "ws", "--set", "runtime.timeout_minutes=0.15")
    run = start(forks, *words, cwd=tmp_path, environment=SHELL)
    code, line = run.end()
    assert code == 1 and line.startswith("error: waited 0.15 minutes for 3 of 4 processes; SLURM_PROCID=0"), line
    assert "\nwaiting for 3 of 4 processes (SLURM_PROCID=0 SLURM_NTASKS=4 say" in f"\n{run.output}"


def test_a_wait_for_processes_that_never_come_can_be_stopped(forks: ForkServer, toy: Path, tmp_path: Path) -> None:
    run = start(forks, *FINETUNE, toy, "-w", "ws", cwd=tmp_path, environment=SHELL)
    run.wait_for("waiting for 3 of 4")
    os.kill(run.pid, signal.SIGTERM)
    assert run.end() == (75, "error: stopped by SIGTERM; run the same command to continue")


def test_the_shell_of_an_interactive_step_is_one_process(forks: ForkServer, toy: Path, tmp_path: Path) -> None:
    interactive = {**SHELL, "SLURM_STEP_ID": "4294967290", "SLURM_JOB_NAME": "interactive"}
    words = (*FINETUNE, toy, "-w", "ws", "--dry-run")
    run = start(forks, *words, cwd=tmp_path, environment=interactive)
    code, _ = run.end()
    assert code == 0 and "interactive shell of Slurm" in run.output


@contextlib.contextmanager
def two_training(data: Path, folder: Path, *words: str, before: str = "") -> Iterator["subprocess.Popen[str]"]:
    """Two processes that train, ignoring what the lines of `before` say."""
    more = ("--steps", "5000", "--set", "training.log_every=1", *TWO, *words)
    with command(*FINETUNE, data, "-w", "ws", *more, cwd=folder, before=before) as process:
        metrics = folder / "ws" / "finetune" / ".run.partial" / "metrics.jsonl"
        wait_until(lambda: (metrics.exists() and metrics.stat().st_size > 0) or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        yield process


def test_a_signal_that_is_ignored_stays_ignored_in_two_processes(toy: Path, tmp_path: Path) -> None:
    ignoring = "for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT): signal.signal(number, signal.SIG_IGN)"
    with two_training(toy, tmp_path, before=ignoring) as process:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
            os.killpg(process.pid, number)
        time.sleep(3)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        code, line = ended(process)
    assert code == 75 and line.startswith("error: stopped by SIGTERM; everything is saved"), line


def test_one_of_two_hangs_and_a_second_signal_ends_both(toy: Path, tmp_path: Path) -> None:
    with two_training(toy, tmp_path) as process:
        ranks = [pid for pid in children_of(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(ranks[1], signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code, line = ended(process)
        assert time.monotonic() - began < 10
    assert (code, line) == (75, "error: stopped by SIGTERM; run the same command to continue")


def test_two_processes_that_wait_for_images_stop(toy: Path, tmp_path: Path) -> None:
    with training(tmp_path, toy, "--num-workers", "1", *TWO) as process:
        process.send_signal(signal.SIGTERM)
        code, line = ended(process)
    assert code == 75 and line.startswith("error: stopped by SIGTERM"), line
