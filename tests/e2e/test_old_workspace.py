"""The workspace of an earlier commit goes on and is measured with the same numbers; that of a later one is refused.

`old_workspace/` was written by commit 23804cb, see `helpers/old_workspace.py`. It is not to be written anew where a
format changes: the way forward is to read it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.commandline import aligndet
from helpers.narrow import narrow_backbones
from helpers.old_workspace import DATA, EVALUATE, FINETUNE, PRETRAIN, STOPPED_AFTER, numbers_of

pytestmark = pytest.mark.e2e

OLD = Path(__file__).with_name("old_workspace")
PARTIAL, TUNED, MEASURED = "pretrain-box/.stopped.partial", "finetune/done", "evaluate/done-train"
RESUME = f"{PARTIAL}/resume/step-{STOPPED_AFTER:09d}.pt"


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """A copy, whose data is in this checkout."""
    folder = tmp_path / "workspace"
    shutil.copytree(OLD / "stages", folder)
    for file in folder.rglob("*.json*"):
        file.write_text(file.read_text().replace(DATA, str(OLD / "toy")))
    with narrow_backbones:
        yield folder


def test_a_stopped_run_continues_with_the_same_numbers(workspace: Path) -> None:
    assert f"continuing after step {STOPPED_AFTER}" in aligndet(*PRETRAIN, "-w", workspace).stderr
    found, expected = (
        numbers_of(workspace / "pretrain-box" / "stopped"),
        json.loads((OLD / "expected.json").read_text()),
    )
    assert len(found["metrics"]) == len(expected["metrics"]) == 6
    for line, before in zip(found["metrics"], expected["metrics"], strict=True):
        assert line == pytest.approx(before, rel=1e-4)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def test_a_fine_tuned_detector_is_measured_with_the_same_numbers(workspace: Path) -> None:
    aligndet(*EVALUATE, "-w", workspace, "--name", "again")
    found, expected = (
        json.loads((workspace / "evaluate" / name / "metrics.json").read_text()) for name in ("again", "done-train")
    )
    assert expected["AP"] > 0.01
    for key in ("AP", "AP50", "AP75", "APs", "AR1", "AR10", "AR100"):
        assert found[key] == pytest.approx(expected[key], abs=1e-4), key
    assert found["counts"] == expected["counts"]


def test_what_is_finished_is_finished(workspace: Path) -> None:
    for words in (FINETUNE, EVALUATE):
        assert "already complete" in aligndet(*words, "-w", workspace).stdout
    table = aligndet("status", "-w", workspace).stdout
    assert all(name in table for name in ("done", "done-train", "stopped", "train-k4"))


def change_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_tensors(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


# By what it is: the file, the key of its version, this version, a command that reads it, and the code of its refusal.
FORMATS: dict[str, tuple[str, str, int, tuple[str, ...], int]] = {
    "workspace": ("workspace.json", "format_version", 1, EVALUATE, 2),
    "interrupted run": (f"{PARTIAL}/manifest.json", "format_version", 1, PRETRAIN, 2),
    "checkpoint": (RESUME, "version", 2, PRETRAIN, 2),
    "proposals": ("proposals/train/manifest.json", "format_version", 1, PRETRAIN, 2),
    "clusters": ("cluster/train-k4/manifest.json", "format_version", 1, ("status",), 2),
    "finished run": (f"{TUNED}/manifest.json", "format_version", 1, EVALUATE, 2),
    "detector": (f"{TUNED}/weights.pt", "format_version", 1, (*EVALUATE, "--name", "again"), 4),
    "evaluation": (f"{MEASURED}/manifest.json", "format_version", 1, EVALUATE, 2),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_of_later_is_one_line(workspace: Path, name: str) -> None:
    file, key, version, words, code = FORMATS[name]
    change = change_tensors if file.endswith(".pt") else change_json
    change(workspace / file, lambda content: content.update({key: version + 1}))
    place = workspace / (file.removesuffix("/manifest.json"))
    line = aligndet(*words, "-w", workspace, code=code).error_line()
    assert line == f"error: {place}: written by a newer aligndet (format {version + 1}): upgrade"


@pytest.mark.parametrize("name", [name for name, (file, *_) in FORMATS.items() if file.endswith(".json")])
def test_what_has_no_version_is_of_the_first_format(workspace: Path, name: str) -> None:
    file, key, _, words, _ = FORMATS[name]
    change_json(workspace / file, lambda content: content.pop(key))
    ran = aligndet(*words, *(() if words[0] == "status" else ("--dry-run",)), "-w", workspace)
    assert ran.code == 0 and "error: " not in ran.stderr
