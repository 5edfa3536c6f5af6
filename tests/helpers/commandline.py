"""Runs commands of `aligndet` inside the test process, and the small settings that all such tests share."""

import functools
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click import Command
from click.testing import CliRunner
from typer.main import get_command

from aligndet_cli.cli import app

RESOLUTION = ("--short-side", "64", "--long-side", "96")
NECK = ("--set", "detector.neck_channels=32", "--set", "detector.head_convs=1")
BACKBONE = ("--backbone", "resnet18")
RANDOM = ("--backbone-weights", "none")
DETECTOR = ("--detector", "retinanet", *BACKBONE)
SMALL = (*NECK, *RESOLUTION, "--steps", "6", "--batch-size", "2")
# The five commands with the fewest words that find their inputs, and what makes them small.
CHAIN: dict[str, tuple[str, ...]] = {
    "proposals": ("--set", "working_size=96", "--min-size", "16", "--num-workers", "1"),
    "cluster": ("--k", "4", "--pca-dim", "4", *BACKBONE, *RANDOM, *RESOLUTION),
    "pretrain-box": (*DETECTOR, *RANDOM, *SMALL),
    # After six steps all scores are low: keep them, so that there is something to evaluate.
    "finetune": (*DETECTOR, *SMALL, "--set", "detector.score_threshold=0.005"),
    "evaluate": (),
}

# Of what a stage leaves, the files that hold times and paths.
VARYING = {"manifest.json", "config.json", "speed.jsonl"}


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        content = json.loads(self.stdout)
        assert isinstance(content, dict) and content["schema_version"] == 1
        return content

    def error_line(self) -> str:
        """The last line of stderr, which must be the one line of an error."""
        last = self.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and self.stderr.count("error: ") == 1, self.stderr
        assert "Traceback" not in self.stderr
        return last


@functools.cache
def _command() -> Command:
    """All commands, which typer takes 60 ms to build."""
    return get_command(app)


def aligndet(*words: str | Path, code: int | None = 0) -> Ran:
    """Run one command and check its exit code (None: any); a bug of ours comes through as the exception that it is."""
    with own_logging():
        result = CliRunner().invoke(_command(), [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert code in (result.exit_code, None), (
        f"exit code {result.exit_code}, not {code}:\n{result.stdout}\n{result.stderr}"
    )
    return Ran(result.exit_code, result.stdout, result.stderr)


@contextmanager
def own_logging() -> Iterator[None]:
    """A command sets up the package's log for its process; put it back for the tests after it."""
    logger = logging.getLogger("aligndet")
    before = (logger.handlers[:], logger.level, logger.propagate)
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])


def run_chain(data: Path, workspace: Path, *stages: str, more: dict[str, tuple[str, ...]] | None = None) -> None:
    """Run stages (default: all five) in order; `more` adds words to some of them."""
    for stage in stages or CHAIN:
        named = (data,) if stage == "proposals" else ()
        aligndet(stage, *named, "-w", workspace, *CHAIN[stage], *(more or {}).get(stage, ()))


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file under a folder by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def results_of(folder: Path) -> dict[str, bytes]:
    """Content of the files that must not depend on when, where and in how many goes they were made, nor on the name."""
    found = {name: content for name, content in files_of(folder).items() if Path(name).name not in VARYING}
    if "README.md" in found:
        found["README.md"] = found["README.md"].replace(f"# {folder.name}\n".encode(), b"# NAME\n")
    return found


def assert_same_results(found: Path, expected: Path) -> None:
    """The same files with the same bytes; those that differ are named, not shown. Plots may be empty: `plots.py`."""
    ours, theirs = results_of(found), results_of(expected)
    assert theirs and ours.keys() == theirs.keys()
    differ = [name for name in theirs if ours[name] != theirs[name]]
    assert [name for name in differ if not (name.endswith(".png") and b"" in (ours[name], theirs[name]))] == []


def environment(**more: str) -> dict[str, str]:
    """For the processes that a test starts: one thread, no downloads, and more."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "ALIGNDET_OFFLINE": "1", **more}
