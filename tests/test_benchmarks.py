"""The benchmarks are run by hand: at least what they import must be there."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet_cli.config import DataConfig
from helpers.commandline import environment

MACHINE = {
    **{"card": "a card", "torch": "2.11", "commit": "abc", "command": "gpu.py", "precision": "bf16-mixed"},
    **{"peak_tflops": None, "matrix_tflops": 800.0},
}
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
        assert len(cell["kernels"]) == 10 and not any("Optimizer.step" in name for name, *_ in cell["kernels"])
        assert any("retinanet.py" in place for place in cell["host_waits"])
    lines = (tmp_path / "report.md").read_text().splitlines()
    rows = [line.count("|") for line in lines if line.startswith("| retinanet")]
    assert rows == [13, 13, 11, 11]  # of twelve columns, and of two and eight parts


def test_the_variants_of_layers_are_measured_in_a_toy_size(tmp_path: Path) -> None:
    words = ("--device", "cpu", "--rounds", "1", "--output", str(tmp_path))
    file = next(file for file in FILES if file.stem == "gpu_variants")
    subprocess.run([sys.executable, str(file), *words], check=True, capture_output=True, env=environment())
    rows = [line.split(" | ") for line in (tmp_path / "variants.md").read_text().splitlines()[4:]]
    assert len(rows) == 14 and all(float(time_ms) > 0 for _, _, time_ms, _ in rows)


@pytest.fixture
def gpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    file = next(file for file in FILES if file.stem == "gpu")
    spec = importlib.util.spec_from_file_location("benchmark_of_gpu", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def full_size(gpu_benchmark: Any, tmp_path: Path) -> Any:
    """The benchmark as it is on a GPU, which building its cells does not take."""
    gpu_benchmark.write_coco(tmp_path / "coco", 1)
    images = gpu_benchmark.open_images(DataConfig(root=tmp_path / "coco"), purpose="train", with_masks=True)
    return gpu_benchmark.Bench(torch.device("cuda:0"), 16, images, tmp_path / "report", time.monotonic() + 600, "")


def test_the_cells_of_a_gpu_are_those_of_the_paper(gpu_benchmark: Any, full_size: Any) -> None:
    cells = gpu_benchmark.cells_of(gpu_benchmark.FAMILIES, gpu_benchmark.STAGES, gpu_benchmark.MODES)
    assert len(cells) == len(set(cells)) == 5 * 2 * 2
    for cell in cells:
        plan = full_size.plan(cell)
        assert plan.detector.family == cell.detector and plan.short_sides == (640, 672, 704, 736, 768, 800)
        assert plan.config.runtime.precision == "bf16-mixed" and plan.config.runtime.compile == (cell.mode == "compile")
        with torch.device("meta"):
            assert sum(weights.numel() for weights in plan.build_views().parameters()) > 3e7


def test_a_cell_that_fails_leaves_its_reason_and_the_others(
    gpu_benchmark: Any, full_size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(figures: Any) -> None:
        figures.images_per_s, figures.step_ms, figures.spread_ms = 240.0, 66.0, 1.0
        figures.first_steps_s, figures.memory_gb = 3.0, 41.0
        if figures.cell.stage == "finetune":
            raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(full_size, "_fill", fill)
    monkeypatch.setattr(gpu_benchmark, "describe", lambda _: {**MACHINE, "batch_size": 16})
    cells = [gpu_benchmark.Cell("retinanet", stage, "eager") for stage in ("finetune", "pretrain-box")]
    gpu_benchmark.run(full_size, cells)
    failed, passed = json.loads((full_size.output / "report.json").read_text())["cells"]
    assert failed["problem"] == "ZeroDivisionError: on purpose" and "in fill" in failed["trace_of_problem"]
    assert not passed["problem"] and passed["images_per_s"] == 240
    text = (full_size.output / "report.md").read_text()
    assert "## What went wrong in retinanet, finetune, eager" in text and text.count("| 240.0 |") == 2


def test_the_benchmark_of_a_gpu_needs_no_git(
    gpu_benchmark: Any, full_size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_benchmark, "measure_products", lambda _: 8e14)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    found = gpu_benchmark.describe(full_size)
    assert found["commit"] == "unknown" and found["peak_tflops"] == 989
