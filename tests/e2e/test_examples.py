"""Every script in examples/ runs, small, on the toy set. Those of the paper's tables share one workspace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forks import ForkServer

from aligndet_cli.data.toy import draw_toy_data

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = ("common.sh", "effect.sh")  # sourced by others; hours long at its smallest, and a study like the rest
SCRIPTS = sorted(file.name for file in EXAMPLES.glob("*.sh") if file.name not in SHARED)
OF_PAPER = [name for name in SCRIPTS if name.startswith(("table", "figures"))]
OTHERS = [name for name in SCRIPTS if name not in OF_PAPER]
ROWS = {  # of the table that a script ends with
    "table02.sh": 10,  # five detectors, with and without
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples-toy")
    draw_toy_data(folder, seed=0, num_train=11, num_val=5, size_hw=(96, 128))
    return folder


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def programs(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with `aligndet` in it."""
    folder = tmp_path_factory.mktemp("bin")
    forks.write_command(folder)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def run(script: str, *words: str, cwd: Path, programs: str) -> str:
    environment = {**os.environ, "PATH": programs, "SMOKE": "1", "OMP_NUM_THREADS": "1", "ALIGNDET_OFFLINE": "1"}
    command = ["bash", str(EXAMPLES / script), *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("script", OTHERS)
def test_example(script: str, toy: Path, tmp_path: Path, programs: str) -> None:
    run(script, str(toy), "none", cwd=tmp_path, programs=programs)
    assert list((tmp_path / "workspace" / "evaluate").glob("*/metrics.json"))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.xdist_group("tables")
@pytest.mark.parametrize("script", OF_PAPER)
def test_script_of_the_paper(script: str, shared_folder: Path, programs: str) -> None:
    out = run(script, cwd=shared_folder, programs=programs)
    print(out)
