"""The page on the Python API, and the notebook beside it: what they show runs as it stands, and has types."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from helpers.scripts import EXAMPLES

ROOT = EXAMPLES.parent
PAGE = ROOT / "docs" / "python.md"


def blocks(page: Path) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_four_names(chain: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    example, stages = blocks(PAGE)
    assert "example: the tests run this block as it stands" in PAGE.read_text() and "pretrain_box(" in stages
    for stage, name in (("pretrain-box", "boxes"), ("finetune", "labels")):
        shutil.copytree(chain / stage / "retinanet-resnet18", tmp_path / "workspace" / stage / name)
    shutil.copytree(toy / "val", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(PAGE), "exec"), {"__name__": "example"})
    lines = capsys.readouterr().out.splitlines()
    assert sum("000" in line and ".jpg" in line for line in lines) == 11
    assert lines[-1] == "{'c2': (2, 64, 56, 56), 'c3': (2, 128, 28, 28), 'c4': (2, 256, 14, 14), 'c5': (2, 512, 7, 7)}"


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    book = json.loads((EXAMPLES / "python.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5) and book["metadata"]["kernelspec"][
        "language"
    ] == "python"
    cells = book["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        fields = {"cell_type", "id", "metadata", "source"}
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == fields | code and not cell.get("outputs") and cell.get("execution_count") is None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "notebook"}
    with mpl.rc_context({"backend": "Agg"}):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    out = capsys.readouterr().out
    assert out.count("loss_box_reg") == 3 and "too short" in out
    assert names["detector"].names == names["again"].names and len(names["losses"]) == 4


@pytest.mark.slow
def test_mypy_accepts_code_that_uses_it(tmp_path: Path) -> None:
    for number, block in enumerate(blocks(PAGE)):
        (tmp_path / f"block{number}.py").write_text(block)
    (tmp_path / "more.py").write_text(
        """
from typing import Any

import torch
from PIL import Image
from typing_extensions import assert_type

import aligndet_cli
import aligndet_cli as aligndet
from aligndet_cli import AlignDetError, ImageDetector, Outcome, finetune, load

detector = load("weights.pt", 91)
assert_type(detector, ImageDetector)
assert_type(detector.predict(Image.open("a.jpg")), list[dict[str, torch.Tensor]])
assert_type(finetune({"training.steps": 3}, "workspace", force=True), Outcome)
finetune(aligndet.FinetuneConfig.model_validate({"fraction": 10}), steps=3)
finetune(aligndet.ProposalsConfig.model_validate({}))  # type: ignore[arg-type]
assert_type(aligndet.evaluate().result, dict[str, Any])
try:
    aligndet_cli.pretrain_box(on_step=lambda step, losses: print(step + 1, losses["loss_box_reg"]))
except AlignDetError as error:
    print(error.exit_code)
detector.predict(3)  # type: ignore[arg-type]
aligndet.load("weights.pt", classes=3)  # type: ignore[arg-type]
aligndet.finetune(on_step=3)  # type: ignore[arg-type]
"""
    )
    files = sorted(map(str, tmp_path.glob("*.py")))
    words = ["-m", "mypy", "--strict", "--follow-imports=silent", "--config-file", os.devnull]
    words += ["--cache-dir", str(ROOT / ".mypy_cache" / "strict")]
    ran = subprocess.run([sys.executable, *words, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
