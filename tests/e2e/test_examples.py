"""Every script in examples/ runs, small, on the toy set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aligndet_cli.data.toy import draw_toy_data

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(file.name for file in EXAMPLES.glob("*.sh"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples-toy")
    draw_toy_data(folder, seed=0, num_train=11, num_val=5, size_hw=(96, 128))
    return folder


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script: str, toy: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SMALL": "1", "OMP_NUM_THREADS": "1", "ALIGNDET_OFFLINE": "1"}
    command = ["bash", str(EXAMPLES / script), str(toy), "none"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "workspace" / "evaluate").glob("*/metrics.json"))
