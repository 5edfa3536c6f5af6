"""Commands that may take only so much memory (`ulimit -v`): a batch that fits, or one line before anything is done."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commandline import aligndet, environment

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space"),
]

# What is imported takes more addresses than the steps, and differs between builds of torch: the limit comes on top.
LIMITED = """
import resource, sys
from aligndet_cli.tools.bench import measure
from aligndet_cli.finetune import stage
from aligndet_cli.processes.memory import process_usage
limit = process_usage().mapped + int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from aligndet_cli.cli import main
main()
"""
# About 0.1 GB for each image of 320 x 533, after 0.2 GB for the model.
LARGE = ("--short-side", "320", "--long-side", "533", "--set", "detector.head_convs=1", "--backbone", "resnet18")


def limited(mib: int, *words: str | Path, timeout: float = 240) -> tuple[int, list[str]]:
    """Exit code and lines of a command with so many MiB above what it takes to start."""
    command = [sys.executable, "-c", LIMITED, str(mib), *(str(word) for word in words)]
    done = subprocess.run(command, env=environment(COLUMNS="200"), timeout=timeout, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()


def train(workspace: Path, *words: str) -> tuple[str | Path, ...]:
    named = ("--init", "scratch", "--detector", "retinanet", "--name", "limited")
    return ("finetune", "-w", workspace, *named, *LARGE, "--steps", "1", *words)


@pytest.fixture
def workspace(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain, tmp_path / "workspace"))


def test_a_batch_that_does_not_fit_is_refused_before_the_run_and_auto_takes_it_apart(workspace: Path) -> None:
    before = sorted(workspace.rglob("*"))
    for words in ((), ("--dry-run",)):
        code, lines = limited(900, *train(workspace, *words))
        assert code == 1 and lines[0] == "trying a step with one image of 320x533, to see how many fit into memory"
        assert len(lines) == 2 and lines[1].startswith("error: a step with 16 images needs about "), lines
        assert "GB for it: use --batch-size " in lines[1] and "--accumulate" in lines[1]
    assert sorted(workspace.rglob("*")) == before
    code, lines = limited(900, *train(workspace, "--batch-size", "auto"))
    assert code == 0, lines
    training = json.loads((workspace / "finetune" / "limited" / "config.json").read_text())["training"]
    parts = training["accumulate"]
    assert training["batch_size"] == 16 and parts in (2, 4, 8, 16)
    assert any(line.endswith(f", in {parts} parts (--accumulate {parts})") for line in lines)
    assert f"first step (1): 16 images of up to 320x533, in {parts} parts" in lines
    # Without the limit it is what it was.
    again = aligndet(*train(workspace, "--batch-size", "auto"))
    assert "already complete" in again.stdout and "trying a step" not in again.stderr


def test_bench_is_refused_like_the_stages(toy: Path) -> None:
    code, lines = limited(900, "bench", toy, *LARGE, "--accelerator", "cpu", "--stage", "finetune")
    told = "error: finetune: a step with 16 images of 320x533 needs at least "
    assert code == 1 and lines[-1].startswith(told), lines
    assert "use --batch-size" in lines[-1] and "--accumulate" not in lines[-1]


def test_memory_that_runs_out_all_the_same_is_one_line(workspace: Path) -> None:
    # Too little for any step, so little that the one that is tried beforehand says nothing else.
    code, lines = limited(150, *train(workspace, "--batch-size", "1"))
    assert code == 1 and lines[-1].startswith("error: ") and "memory" in lines[-1], lines
