"""What a command does where its output goes nowhere: a full disk, a closed pipe, an odd terminal, an old locale."""

import fcntl
import json
import os
import pty
import resource
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from helpers.commandline import CHAIN, environment
from helpers.forks import ForkServer

pytestmark = pytest.mark.e2e

COMMANDS = {
    **{stage: words for stage, words in CHAIN.items() if stage != "proposals"},
    "status": (),
    "report": (),
    "doctor": (),
    "views": (),
    "predict": ("{toy}/val",),
    "export": ("--to", "torchvision", "--output", "{w}/out.pth"),
    "toy": ("{w}/pictures", "--train", "1", "--val", "1"),
    "split": ("{toy}", "--output", "{w}/folds", "--fractions", "50", "--folds", "1"),
    "ls detectors": (),
    "config show": ("evaluate",),
    "evaluate --help": (),
    "--version": (),
    "--help": (),
}
WITHOUT_WORKSPACE = {"toy", "split", "ls detectors", "config show", "evaluate --help", "--version", "--help"}
WITHOUT_JSON = {"toy", "ls detectors", "evaluate --help", "--version", "--help"}


@pytest.fixture(scope="module")
def command(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program `aligndet` that starts in a moment."""
    folder = tmp_path_factory.mktemp("bin")
    forks.write_command(folder)
    return folder / "aligndet"


@pytest.fixture
def workspace(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain, tmp_path / "w"))


def words_of(name: str, workspace: Path, toy: Path, *more: str) -> list[str]:
    words = [word.format(w=workspace, toy=toy) for word in COMMANDS[name]]
    place = [] if name in WITHOUT_WORKSPACE else ["-w", str(workspace)]
    return [*name.split(), *words, *place, *more]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_and_a_closed_pipe(command: Path, workspace: Path, toy: Path, name: str) -> None:
    for more in ((), ("--json",))[: 1 if name in WITHOUT_JSON else 2]:
        words = [str(command), *words_of(name, workspace, toy, *more)]
        with Path("/dev/full").open("wb") as full:
            ran = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        assert ran.returncode == 1, ran.stderr
        assert ran.stderr.splitlines()[-1].startswith("error: stdout: No space left on device; free some space")
        assert "Traceback" not in ran.stderr and ran.stderr.count("error: ") == 1
        shutil.rmtree(workspace / "pictures", ignore_errors=True)
        # Nobody reads: quiet, and the code of what was done.
        reading, writing = os.pipe()
        os.close(reading)
        ran = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        os.close(writing)
        assert ran.returncode == 0 and "error" not in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
        shutil.rmtree(workspace / "pictures", ignore_errors=True)


def test_an_error_keeps_its_code_where_nobody_hears_it(command: Path, workspace: Path, toy: Path) -> None:
    words = [str(command), "evaluate", "-w", str(workspace), "--run", "nothing", "--json"]
    with Path("/dev/full").open("wb") as full:
        for stdout, stderr in ((full, subprocess.PIPE), (full, full), (subprocess.PIPE, full)):
            ran = subprocess.run(words, stdout=stdout, stderr=stderr, text=True, timeout=60, check=False)
            assert ran.returncode == 2
            assert not ran.stderr or ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    assert json.loads(ran.stdout)["exit_code"] == 2


def test_a_run_goes_on_when_the_reader_of_its_log_is_gone(command: Path, workspace: Path, toy: Path) -> None:
    for name in ("finetune", "evaluate"):
        words = [str(command), *words_of(name, workspace, toy, "--name", "other", "--progress", "plain")]
        with Path("/dev/full").open("wb") as full:
            ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, text=True, timeout=60, check=False)
        assert ran.returncode == 0 and str(workspace / name / "other") in ran.stdout


# ---- these need a process of their own ----


def run_python(*words: str | Path, cwd: Path, limits: dict[int, int] | None = None, **more: str) -> tuple[int, str]:
    """Return exit code and stderr of a command in a fresh Python."""

    def limit() -> None:
        for kind, number in (limits or {}).items():
            resource.setrlimit(kind, (number, number))

    ran = subprocess.run(
        [sys.executable, "-m", "aligndet_cli.cli", *map(str, words)],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        timeout=120,
        check=False,
        preexec_fn=limit,  # noqa: PLW1509  # nothing else runs in the child
    )
    return ran.returncode, ran.stderr.decode(errors="replace")


@pytest.mark.slow
def test_an_old_locale_prints_and_reads_any_name(toy: Path, tmp_path: Path) -> None:
    """Names in UTF-8 in the locale C, where Python would take ASCII; and a stdout of ASCII."""
    data = Path(shutil.copytree(toy, tmp_path / "möwe"))
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for more in (old, {"PYTHONIOENCODING": "ascii"}):
        code, told = run_python("doctor", data, "-w", "wörk", cwd=tmp_path, **more)
        assert code == 0 and "Traceback" not in told, told
        code, told = run_python("evaluate", data, "-w", "wörk", cwd=tmp_path, **more)
        assert code == 2 and told.startswith("error: ") and told.count("\n") == 1, told


@pytest.mark.slow
def test_few_files_and_little_memory(chain: Path, tmp_path: Path) -> None:
    words = ("evaluate", "-w", Path(shutil.copytree(chain, tmp_path / "w")), "--force", "--num-workers", "0")
    for limits, said in (
        ({resource.RLIMIT_NOFILE: 8}, "Too many open files"),
        ({resource.RLIMIT_AS: 15 << 27}, "memory"),
    ):
        code, told = run_python(*words, cwd=tmp_path, limits=limits)
        assert "Traceback" not in told and (code == 0 or (code == 1 and said in told.splitlines()[-1])), told


@pytest.mark.slow
def test_a_terminal_without_width_and_a_folder_that_is_gone(chain: Path, tmp_path: Path) -> None:
    for words in (["status", "-w", str(chain)], ["status", "--help"], ["finetunee"]):
        pid, terminal = pty.fork()
        if pid == 0:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
            own = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")}
            os.execve(sys.executable, [sys.executable, "-m", "aligndet_cli.cli", *words], own)
        shown = b""
        while True:
            try:
                shown += os.read(terminal, 1 << 16)
            except OSError:  # its end
                break
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (2 if words == ["finetunee"] else 0)
        assert b"Traceback" not in shown and b"status" in shown or b"retinanet" in shown or b"finetunee" in shown
    script = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} -m aligndet_cli.cli status"
    ran = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (2, b"error: the current folder was deleted: change to another one\n")
