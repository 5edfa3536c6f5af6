"""A message names only flags that the command which prints it has."""

import ast
import errno
import re
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
import typer.main

import aligndet_cli
from aligndet_cli.cli import app
from aligndet_cli.config import STAGES
from aligndet_cli.errors import RunError, as_user_error
from aligndet_cli.flags import known_settings
from aligndet_cli.training.loop import known_errors

PACKAGE = Path(aligndet_cli.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
TRAINING = ("pretrain-image", "pretrain-box", "finetune")
ON_PROPOSALS = ("cluster", "pretrain-box")
# Commands that can print the messages of a file or folder; the longest path counts. Others are printed by their own
# command alone, see `commands_of`, or define the flags themselves.
PRINTED_BY: dict[str, tuple[str, ...]] = {
    "artifacts": ON_PROPOSALS,
    "artifacts/exchange.py": ("proposals", "cluster"),
    "files.py": (*STAGES, "views", "report", "export"),
    "backbones": (*TRAINING, "cluster"),
    "backbones/teacher.py": ("pretrain-image",),
    "data": (*STAGES, "doctor"),
    "data/folds.py": ("split",),
    "data/sides.py": ("pretrain-box", "finetune"),
    "data/workers.py": (*TRAINING, "evaluate", "predict", "bench"),
    "detectors/checkpoint.py": ("evaluate", "predict", "export"),
    "detectors/recipes.py": ("pretrain-box", "finetune"),
    "detectors/results.py": ("evaluate", "predict"),
    "processes": STAGES,
    "processes/devices.py": (*TRAINING, "cluster", "evaluate"),
    "training": TRAINING,
    # `pretrain-image` has batches of its own, which are not tried.
    **dict.fromkeys(
        ("training/batch_size.py", "training/fitting.py", "training/footprint.py"), ("pretrain-box", "finetune")
    ),
    "tools/conversion": ("import-weights",),
    "tools/conversion/exporting.py": ("export",),
    "tools/conversion/onnx_file.py": ("export",),
    "workspace.py": STAGES,
    "stage.py": ("pretrain-box",),  # words of the next command
    "driver.py": STAGES,
    "config.py": STAGES,
}
# Messages that not all of them print.
EXCEPTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("artifacts/exchange.py", "--export"): ("proposals",),
    ("files.py", "--output"): ("views", "report", "export"),
    # Chosen among the flags that the command has.
    ("training/loop.py", "--short-side"): ("pretrain-box", "finetune"),
    ("training/loop.py", "--image-size"): ("pretrain-image",),
    ("training/loop.py", "--detector"): ("pretrain-box", "finetune"),
    ("training/loop.py", "detector.neck_norm"): ("pretrain-box", "finetune"),
    ("detectors/checkpoint.py", "--evaluate-every"): ("finetune",),
    ("tools/conversion/onnx_file.py", "--set"): ("finetune",),  # of the run that is exported
    ("tools/conversion/onnx_file.py", "detector.nms_type"): ("finetune",),
    ("processes/ends.py", "--shm-size"): (),  # of docker run
    ("processes/launch.py", "--devices"): (*TRAINING, "cluster", "evaluate"),
    ("config.py", "some.key"): (),  # says how to write it
}
# These define flags, or write pages and command lines.
LEFT_OUT = ("commands", "cli.py", "flags.py", "tools/report", "tools/study/spec.py", "errors.py")


def words_of_commands() -> dict[str, set[str]]:
    """Flags of each command."""
    group = typer.main.get_command(app)
    return {
        name: {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()
    }


FLAGS = words_of_commands()
OTHER = re.compile(rf"`?aligndet ({'|'.join(FLAGS)})([^`]*)`?|\b({'|'.join(FLAGS)})( --[^`]*)")  # another command
SETTING = re.compile(r"--set ([a-z_.]+)=")


def commands_of(file: Path) -> tuple[str, ...]:
    """Commands that can print the messages of a file."""
    name = file.relative_to(PACKAGE).as_posix()
    known = [path for path in PRINTED_BY if name == path or name.startswith(f"{path}/")]
    if known:
        return PRINTED_BY[max(known, key=len)]
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    own = parts[1] if parts[0] == "tools" else parts[0]
    return (own.replace("_", "-"),)


def texts_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of all strings that are no docstrings; names in f-strings are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    pieces = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            pieces.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            pieces.update(value for value in node.values if isinstance(value, ast.Constant))
            yield node.lineno, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in pieces:
            yield node.lineno, node.value


def files() -> list[Path]:
    """Files with messages."""
    found = sorted(PACKAGE.rglob("*.py"))
    kept = [file for file in found if file.name != "command.py" or "tools" in file.parts]
    left_out = tuple(str(PACKAGE / name) for name in LEFT_OUT)
    return [
        file for file in kept if not str(file).startswith(left_out) and any(FLAG.search(t) for _, t in texts_of(file))
    ]


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_flag_that_is_named_is_there(file: Path) -> None:
    missing = []
    for line, text in texts_of(file):
        for command, words in (filter(None, found) for found in OTHER.findall(text) if any(found[1::2])):
            missing += [(line, flag, command) for flag in FLAG.findall(words) if flag not in FLAGS[command]]
        own = OTHER.sub("", text)
        for flag in FLAG.findall(own):
            printed_by = EXCEPTIONS.get((file.relative_to(PACKAGE).as_posix(), flag), commands_of(file))
            missing += [(line, flag, command) for command in printed_by if flag not in FLAGS[command]]
        for setting in SETTING.findall(own):
            printed_by = EXCEPTIONS.get((file.relative_to(PACKAGE).as_posix(), setting), commands_of(file))
            missing += [(line, setting, command) for command in printed_by if not is_setting(setting, command)]
    assert missing == []


def is_setting(path: str, command: str) -> bool:
    known = known_settings(command)
    return path in known or (path.startswith("detector.") and "detector.family" in known)


@pytest.mark.parametrize("command", FLAGS)
def test_advice_on_memory_names_flags_of_the_command(command: str) -> None:
    flags = frozenset(FLAGS[command])
    errors = (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        PermissionError(errno.EACCES, "Permission denied", "x"),
        OSError(errno.EMFILE, "Too many open files"),
        BrokenProcessPool(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("it uses CuBLAS: you must set an environment variable: CUBLAS_WORKSPACE_CONFIG=:4096:8"),
    )
    told = [str(as_user_error(error, flags)) for error in errors]
    for error in (ValueError("Expected more than 1 value per channel when training"), *errors[:2]):
        with pytest.raises(RunError) as caught, known_errors(flags):
            raise error
        told.append(str(caught.value))
    for text in told:
        assert set(FLAG.findall(text)) <= flags, text
        assert "neck_norm" not in text or "--detector" in flags
