"""Faults of the machine in every command: one line and an exit code, never a traceback."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from PIL import Image
from torch._inductor.exc import InvalidCxxCompiler

from aligndet_cli.cli import COMMANDS, EXIT_CODES
from aligndet_cli.config import STAGES
from aligndet_cli.workspace import Workspace
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
    "push": ("retinanet-resnet18", "--to", "hub:somebody/something"),  # which is offline here
    "bench": ("{data}", *TINY, *NECK, "--stage", "finetune"),
    "replay": ("retinanet-resnet18",),  # which did not diverge
}
WITHOUT_WORKSPACE = {"split", "toy", "bench"}
WITH_WORKSPACE = {
    "status",
    "report",
    "figures",
    "study",
    "export",
    "import-weights",
    "evaluate",
    "predict",
    "replay",
    "push",
}
DAMAGED = {"EACCES", "EIO"}  # an image with these may be left out, with a warning
OFF = ("0", "false", "no", "Off", "")
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
WHEN_WRITING = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "ESTALE", "EIO", "EMFILE", "ENOMEM")
WHEN_READING = ("EACCES", "ESTALE", "EIO", "EMFILE", "ENOMEM")
FAULTS = [
    (command, names[(place + skip) % len(names)], is_of_writing, skip)
    for place, command in enumerate(WORDS)
    for names, is_of_writing in ((WHEN_WRITING, True), (WHEN_READING, False))
    for skip in (0, 3, 10)
    if command != "demo" and (command != "bench" or skip == 3)  # the same stages, for minutes; seconds
]


@pytest.mark.parametrize(("command", "name", "is_of_writing", "skip"), FAULTS)
def test_a_fault_of_the_disk_is_one_line(
    workspace: Path, toy: Path, tmp_path: Path, command: str, name: str, is_of_writing: bool, skip: int
) -> None:
    number, folder = getattr(errno, name), tmp_path if is_of_writing or command in WITH_WORKSPACE else toy
    fault = Fault(number, folder, is_of_writing, skip)
    with failing(fault):
        told = told_by(words_of(command, workspace, toy))
    assert told or fault.count <= skip or name in DAMAGED, fault


@pytest.mark.parametrize("name", ["EMFILE", "ENOMEM", "ESTALE"])
def test_no_image_is_left_out_because_no_file_can_be_opened(toy: Path, tmp_path: Path, name: str) -> None:
    words = ["proposals", str(toy), "-w", str(tmp_path), *CHAIN["proposals"]]
    with failing(Fault(getattr(errno, name), toy / "train", is_of_writing=False, skip=5)):
        assert os.strerror(getattr(errno, name)) in (told := told_by(words)) or "out of CPU memory" in told
    assert not (tmp_path / "proposals" / "train").exists()


def test_a_full_disk_names_the_file_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, workspace: Path, toy: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "config.json: No space left on device" in told_by([*words_of("proposals", workspace, toy), "--force"])
        assert "report.csv: No space left on device" in told_by(words_of("report", workspace, toy))
    monkeypatch.setattr(Image.Image, "save", full)
    ran = aligndet("predict", toy / "val", "-w", workspace, "--output", workspace / "drawn", code=1)
    assert ".jpg: No space left on device" in ran.error_line() and "was not drawn" not in ran.stderr


def test_a_bug_of_ours_still_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for error in (ValueError("x"), RuntimeError("shapes do not match"), OSError(errno.EBADF, "Bad file descriptor")):
        monkeypatch.setattr(Workspace, "artifacts", raising(error))
        with pytest.raises(type(error), match=str(error)[-9:]):
            aligndet("status", "-w", tmp_path)


# What libraries raise for faults of the machine, and a word of the advice.
OF_LIBRARIES = (
    (MemoryError(), "out of CPU memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of GPU memory"),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        "out of CPU memory",
    ),
    (cv2.error("OpenCV(4.10) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes"), "CPU memory"),
    (ImportError("libx.so: failed to map segment from shared object"), "out of CPU memory"),
    (ImportError("libx.so: cannot open shared object file: Too many open files"), "ulimit -n"),
    (RuntimeError("can't start new thread"), "ulimit -u"),
    (OSError(errno.EFBIG, "File too large", "x"), "ulimit -f"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
    (RuntimeError("Could not determine home directory."), "set HOME"),
    (RuntimeError("cannot cache function 'f': no locator available for file 'x.py'"), "set NUMBA_CACHE_DIR"),
    (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "nvidia-smi"),
    (BrokenProcessPool(), "a helper process was killed"),
    (UnicodeEncodeError("ascii", "m\xf6we", 1, 2, "ordinal not in range(128)"), "set LC_ALL=C.UTF-8"),
    (InvalidCxxCompiler(), "leave out --compile"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "moved or deleted"),
)


@pytest.mark.parametrize(("error", "said"), OF_LIBRARIES)
def test_what_libraries_raise_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    monkeypatch.setattr(Workspace, "artifacts", raising(error))
    assert said in aligndet("status", "-w", tmp_path, code=1).error_line()
    ran = aligndet("status", "-w", tmp_path, "--json", code=1)
    assert said in ran.json()["message"] and ran.json()["message"] in ran.error_line()


def raising(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# ---- usage ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("finetune", "--lrr", "3"), "No such option: --lrr"),
        (("finetune", "--seed", "x"), "Invalid value for '--seed'"),
        (("finetune", "--lr"), "Option '--lr' requires an argument"),
        (("finetune", "--resume=3"), "Option '--resume' does not take a value"),
        (("finetune", "a", "b"), "unexpected extra argument"),
        (("finetunee",), "No such command 'finetunee'"),
        (("ls", "detector"), "No such command 'detector'"),
        (("--nothing",), "No such option: --nothing"),
        (("toy",), "which folder?"),
        (("toy", "x", "--seed", "4294967296"), "--seed 4294967296: should be 0 to 4294967295"),
        (("demo", "--seed", "-1"), "--seed -1: should be 0 to 4294967295"),
    ],
)
def test_errors_of_usage_are_one_line_and_one_object(words: tuple[str, ...], said: str) -> None:
    ran = aligndet(*words, code=2)
    assert said in ran.error_line() and ran.stderr.count("\n") == 1 and ran.stdout == ""
    if words[0] in ("toy", "ls", "--nothing"):
        return  # without --json
    ran = aligndet(*words, "--json", code=2)
    content = ran.json()
    assert set(content) == {"schema_version", "status", "exit_code", "message"}
    assert (content["status"], content["exit_code"]) == ("error", 2)
    assert ran.stderr == f"error: {content['message']}\n"


@pytest.mark.parametrize("command", [*STAGES, "views", "bench"])
@pytest.mark.parametrize("seed", [-1, 2**32, 10**23])
def test_a_seed_out_of_range_exits_2_everywhere(tmp_path: Path, command: str, seed: int) -> None:
    said = f"seed: should be 0 to 4294967295, got {seed}"
    file = tmp_path / "seed.toml"
    file.write_text(f"seed = {seed}\n")
    ways = [("--seed", str(seed)), ("--set", f"seed={seed}")]
    ways += [("--config", str(file))] if command != "bench" else []
    for words in ways if seed < 2**63 else ways[:2]:  # TOML has no larger ones
        place = () if command == "bench" else ("-w", tmp_path)
        assert said in aligndet(command, tmp_path, *place, *words, code=2).error_line()


@pytest.mark.parametrize(
    ("value", "is_off"), [("1", 1), ("True", 1), ("yes", 1), ("on", 1), *((word, 0) for word in OFF)]
)
def test_a_switch_of_the_environment(monkeypatch: pytest.MonkeyPatch, value: str, is_off: int) -> None:
    monkeypatch.setenv("ALIGNDET_OFFLINE", value)
    shown = aligndet("config", "show", "finetune", "--json").json()
    assert shown["config"]["runtime"]["offline"] is bool(is_off)


def test_a_switch_has_no_other_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALIGNDET_OFFLINE", "maybe")
    line = aligndet("finetune", tmp_path, code=2).error_line()
    assert line == "error: ALIGNDET_OFFLINE=maybe: write 1, true, yes or on, or else 0, false, no, off or nothing"


def test_a_number_that_no_library_holds_exits_2(tmp_path: Path) -> None:
    line = aligndet("pretrain-box", "-w", tmp_path, "--topk", str(10**23), code=2).error_line()
    assert "topk: 100000000000000000000000 is larger than any number can be" in line
