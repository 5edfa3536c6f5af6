"""The benchmarks are run by hand: at least what they import must be there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commandline import environment

FILES = sorted((Path(__file__).parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_benchmark_can_be_imported(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.slow
def test_the_benchmark_of_a_step_has_a_line_for_each_side() -> None:
    """It builds what the stages build, which moves."""
    words = ("--detectors", "fcos:cb-resnet18", "--sides", "pretrain", "finetune", "--size", "32x48", "--rounds", "1")
    file = next(file for file in FILES if file.stem == "training_step")
    ran = subprocess.run(
        [sys.executable, str(file), *words, "--apart"], check=True, capture_output=True, text=True, env=environment()
    )
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert [row[:2] for row in rows] == [["fcos:cb-resnet18", "pretrain"], ["fcos:cb-resnet18", "finetune"]]
    assert all(float(row[2]) > 0 and float(row[4]) > 0.1 for row in rows)


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_in_a_toy_size(tmp_path: Path) -> None:
    words = ("--device", "cpu", "--detectors", "retinanet", "--modes", "eager", "--output", str(tmp_path))
    file = next(file for file in FILES if file.stem == "gpu")
    subprocess.run([sys.executable, str(file), *words], check=True, capture_output=True, env=environment())
    report = json.loads((tmp_path / "report.json").read_text())
    assert [cell["cell"]["stage"] for cell in report["cells"]] == ["pretrain-box", "finetune"]
    for cell in report["cells"]:
        assert not cell["problem"] and cell["images_per_s"] > 0 and cell["gflop_per_image"] > 0.1
        assert all(cell["parts_ms"].values()) and "matching" in cell["parts_ms"]
        assert len(cell["kernels"]) == 10 and any("retinanet.py" in place for place in cell["host_waits"])
    lines = (tmp_path / "report.md").read_text().splitlines()
    rows = [line.count("|") for line in lines if line.startswith("| retinanet")]
    assert rows == [13, 13, 11, 11]  # of twelve columns, and of two and eight parts
