"""The package as it is published: built, checked as an index does, installed afresh; the image and the workflow."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml

import aligndet_cli
from helpers.commandline import environment

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [one.rpartition(" ")[2] for one in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", one)]


def run(*words: str | Path, folder: Path = ROOT) -> str:
    """Return what a command prints; PYTHONPATH, which would show it this checkout, is not handed on."""
    clean = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    ran = subprocess.run(list(map(str, words)), cwd=folder, env=clean, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the source distribution, by `wheel` and `sdist`."""
    pytest.importorskip("build", reason="build is not installed")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def metadata(built: dict[str, Path]) -> Message:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(wheel.read(name))


def test_an_index_takes_both_files(built: dict[str, Path]) -> None:
    pytest.importorskip("twine", reason="twine is not installed")
    assert run(sys.executable, "-P", "-m", "twine", "check", "--strict", *built.values()).count("PASSED") == 2


def test_the_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    package = ROOT / "aligndet_cli"
    ours = {file.relative_to(ROOT).as_posix() for file in package.rglob("*") if file.is_file()}
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {name for name in ours if "__pycache__" not in name}
    assert "aligndet_cli/py.typed" in names


def test_the_description_has_no_link_that_is_dead_on_an_index(metadata: Message) -> None:
    text = str(metadata.get_payload())
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and [target for target in targets if not target.startswith("https://")] == []
    assert "detectors (`docs/detectors.md`)" in text and "![" not in text
    named = {name for name in re.findall(r"\(`([^`\s]+\.md)`\)", text)}
    assert len(named) > 10 and [name for name in named if not (ROOT / name).exists()] == []


def test_the_metadata_say_whose_it_is_and_for_what(metadata: Message) -> None:
    for key in ("Author", "Keywords", "Classifier", "Project-URL", "License-Expression", "Requires-Python"):
        assert metadata[key], key
    assert metadata["Version"] == aligndet_cli.__version__


def test_the_newest_release_of_the_changelog_is_this_version() -> None:
    releases = re.findall(r"^## \[(\d\S*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0][0] == aligndet_cli.__version__


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def fresh(built: dict[str, Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of programs of a new environment: the package alone is installed, what it needs is this environment's."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    ours = Path(sysconfig.get_paths()["purelib"])
    theirs = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    if request.param == "sdist":
        wheels = folder / "wheels"
        words = ("-m", "build", "--no-isolation", "--wheel", "--outdir", wheels)
        source = folder / "source"
        shutil.unpack_archive(built["sdist"], source, filter="data")
        run(sys.executable, "-P", *words, next(source.iterdir()), folder=folder)
        wheel = next(wheels.glob("*.whl"))
    else:
        wheel = built["wheel"]
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-P", *install, wheel, folder=folder)
    (theirs / "rest.pth").write_text(f"{ours}\n")  # a path in a .pth file: editable installs there do not count
    return folder / "bin"


@pytest.mark.slow
def test_a_fresh_installation_works(fresh: Path, toy: Path, tmp_path: Path) -> None:
    place = run(fresh / "python", "-c", "import aligndet_cli; print(aligndet_cli.__file__)", folder=tmp_path)
    assert Path(place.strip()).is_relative_to(fresh.parent)
    assert run(fresh / "python", "-m", "aligndet_cli", "--version", folder=tmp_path) == f"{aligndet_cli.__version__}\n"
    run(fresh / "aligndet", "config", "show", "evaluate", folder=tmp_path)  # reads settings.json
    words = ("--source", "ground-truth", "--limit", "2", "--num-workers", "1")
    run(fresh / "aligndet", "proposals", toy, *words, folder=tmp_path)
    run(fresh / "aligndet", "report", "--html", folder=tmp_path)  # reads the templates
    assert (tmp_path / "workspace" / "report.html").stat().st_size > 5000


def survives(path: str, ignored: Sequence[str]) -> bool:
    """Return True if a .dockerignore of such lines lets a file or folder through: the last line that fits decides."""
    kept = True
    for line in ignored:
        if fnmatch.fnmatch(path, line.removeprefix("!")):
            kept = line.startswith("!")
    return kept


def test_the_image_copies_what_is_there_and_no_linter_objects() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    copied = [path for line in lines if line.startswith("COPY ") for path in line.split()[1:-1]]
    assert {"pyproject.toml", "aligndet_cli"} <= set(copied)
    assert [path for path in copied if not ((ROOT / path).exists() and survives(path, ignored))] == []
    assert not survives("tests", ignored) and not survives(".git", ignored)
    assert re.search(r"^ARG PYTHON=(\S+)$", "\n".join(lines), re.MULTILINE)[1] in PYTHONS  # type: ignore[index]
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    run(hadolint, "Dockerfile")


def test_the_image_needs_the_pytorch_that_the_package_needs() -> None:
    text = (ROOT / "Dockerfile").read_text()
    needed = [one for one in PROJECT["dependencies"] if one.startswith("torch")]
    assert len(needed) == 2 and all(f'"{one}"' in text for one in needed)


def test_the_workflow_runs_make_targets_on_the_pythons_of_the_metadata() -> None:
    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == PYTHONS == ["3.11", "3.12", "3.13", "3.14"]
    targets = re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {"make check", "make test", "make docs"} <= set(steps)
    assert [step for step in steps if step.removeprefix("make ") not in targets] == []
