"""Faults of the machine in every command: one line and an exit code, never a traceback."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aligndet_cli.cli import COMMANDS, EXIT_CODES
from aligndet_cli.config import STAGES
from helpers.commandline import CHAIN, NECK, aligndet

TINY = ("--backbone", "resnet18", "--short-side", "64", "--long-side", "96", "--batch-size", "2", "--steps", "1")
# Words of each command that does its work anew in a copy of the chain; {data} and {w} are folders.
WORDS: dict[str, tuple[str, ...]] = {
    **{stage: (*words, "--name", "other") for stage, words in CHAIN.items()},
    "pretrain-image": ("{data}", "--backbone", "resnet18", "--image-size", "32", "--steps", "1", "--batch-size", "2"),
    "predict": ("{data}/val",),
    "status": (),
    "report": ("--output", "{w}/report.csv", "--format", "csv"),
    "figures": (),
    "study": ("{w}/study.toml", "--dry-run"),
    "demo": (),
    "doctor": ("{data}",),
    "views": ("{data}",),
    "split": ("{data}", "--output", "{w}/folds"),
    "toy": ("{w}/pictures", "--train", "1", "--val", "1"),
    "import-weights": ("{w}/finetune/retinanet-resnet18/weights.pt",),
    "export": ("--to", "torchvision", "--output", "{w}/out.pth"),
    "bench": ("{data}", *TINY, *NECK, "--stage", "finetune"),
}
WITHOUT_WORKSPACE = {"split", "toy", "bench"}
WITH_WORKSPACE = {"status", "report", "figures", "study", "export", "import-weights", "evaluate", "predict"}
TOLERANT: set[str] = set()
STUDY = """
data = "{data}"
detectors = ["retinanet"]
[[starts]]
label = "plain"
init = "scratch"
"""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
LOOKS = {"os.scandir", "os.listdir"}


@dataclass
class Fault:
    """An error of the system in all calls that change (or read) something below a folder, after the first ones."""

    number: int
    folder: Path
    is_of_writing: bool
    skip: int = 0
    count: int = 0

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Raise the error if this call is concerned."""
        if event not in {*CHANGES, *LOOKS, "open"} or not isinstance(arguments[0], str | os.PathLike):
            return
        is_writing = event in CHANGES or (event == "open" and bool((arguments[2] or 0) & WRITING))
        if is_writing is self.is_of_writing and self.folder in Path(arguments[0]).parents:
            self.count += 1
            if self.count > self.skip:
                raise OSError(self.number, os.strerror(self.number), str(arguments[0]))


ACTIVE: list[Fault] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    for fault in ACTIVE:
        fault.see(event, arguments)


sys.addaudithook(watch)  # for good: a hook cannot be taken back


@contextmanager
def failing(fault: Fault) -> Iterator[None]:
    """Let calls of the system fail while the block runs."""
    ACTIVE.append(fault)
    try:
        yield
    finally:
        ACTIVE.remove(fault)


@pytest.fixture
def workspace(chain: Path, toy: Path, tmp_path: Path) -> Path:
    """A copy of the chain, in a folder with a study and with room for what commands write."""
    copy = Path(shutil.copytree(chain, tmp_path / "w"))
    (copy / "study.toml").write_text(STUDY.format(data=toy))
    return copy


def words_of(command: str, workspace: Path, data: Path) -> list[str]:
    words = [word.format(data=data, w=workspace) for word in WORDS[command]]
    if command == "proposals":
        words = [str(data), *words]
    return [command, *words, *([] if command in WITHOUT_WORKSPACE else ["-w", str(workspace)])]


def told_by(words: list[str]) -> str:
    """Run a command that is allowed to fail, and return its error in one line; "" where it is done all the same."""
    ran = aligndet(*words, code=None)
    assert str(ran.code) in EXIT_CODES
    if ran.code == 0:
        assert "error: " not in ran.stderr and "Traceback" not in ran.stderr
        return ""
    return ran.error_line()


def test_every_command_is_tried() -> None:
    others = {command.__name__.replace("_", "-") for commands in COMMANDS.values() for command in commands}
    assert set(WORDS) == {*STAGES, *others}


# Disk full, over quota, read-only, not allowed, stale NFS, broken disk, out of descriptors, out of memory.
NUMBERS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "ESTALE", "EIO", "EMFILE", "ENOMEM")
FAULTS = [
    (command, NUMBERS[(place + turn * 3) % len(NUMBERS)], is_of_writing, skip)
    for place, command in enumerate(WORDS)
    for turn, (is_of_writing, skip) in enumerate([(True, 0), (True, 4), (False, 0), (False, 4)])
    if command != "demo"  # the same stages, for minutes
]


@pytest.mark.parametrize(("command", "name", "is_of_writing", "skip"), FAULTS)
def test_a_fault_of_the_disk_is_one_line(
    workspace: Path, toy: Path, tmp_path: Path, command: str, name: str, is_of_writing: bool, skip: int
) -> None:
    number, folder = getattr(errno, name), tmp_path if is_of_writing or command in WITH_WORKSPACE else toy
    fault = Fault(number, folder, is_of_writing, skip)
    with failing(fault):
        told = told_by(words_of(command, workspace, toy))
    assert told or fault.count <= skip or command in TOLERANT, fault
