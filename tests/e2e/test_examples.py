"""Every script in examples/ runs, small, on the toy set. Those of the paper's tables share one workspace.

At full scale these ask for the paper's experiments and for no others, which is seen without running them.
"""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.models import convnext_tiny

from aligndet_cli.data.toy import draw_toy_data
from helpers.commandline import aligndet
from helpers.forks import ForkServer
from helpers.studies import TINY
from helpers.table_scripts import FILES, OTHERS, TABLES, pretend, run, start, studies_of

STUDY = Path(__file__).parents[2] / "examples" / "strong-backbones.toml"


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """A folder with an `aligndet` that does nothing, and with what it claims to have made."""
    pretend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples-toy")
    draw_toy_data(folder, seed=0, num_train=11, num_val=5, size_hw=(96, 128))
    return folder


@pytest.fixture(scope="module")
def programs(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `aligndet` in it."""
    folder = tmp_path_factory.mktemp("bin")
    forks.write_command(folder)
    return folder


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("script", OTHERS)
def test_example(script: str, toy: Path, tmp_path: Path, programs: Path) -> None:
    run(script, str(toy), "none", cwd=tmp_path, programs=programs)
    assert list((tmp_path / "workspace" / "evaluate").glob("*/metrics.json"))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.xdist_group("tables")
@pytest.mark.parametrize("script", TABLES)
def test_table(script: str, module_folder: Path, programs: Path) -> None:
    """Ends with a row for each fine-tuned run, all of them measured."""
    lines = run(script, cwd=module_folder, programs=programs).splitlines()
    [top] = [place for place, line in enumerate(lines) if line.startswith("detector ")]
    rows = list(itertools.takewhile(bool, lines[top + 1 :]))  # what came out is told below
    begin, end = lines[top].index(" start ") + 1, lines[top].index(" n ") + 1
    asked = []
    for runs in studies_of(script, module_folder):
        asked += [one.config().to_json()["label"] for one in runs if one.stage == "finetune"]
    assert sorted(line[begin:end].strip() for line in rows) == sorted(asked)
    assert all(re.match(r"1 +\d+\.\d\b", line[end:]) for line in rows)
    assert (script == "table12.sh") == (top > 0)
    if script == "table12.sh":  # millions of parameters, images, steps and hours, beside the paper's
        assert [line.split()[0] for line in lines[1:top]] == ["pretrain-box", "finetune"]
        assert lines[1].split()[1:6] == ["0.40", "M", "11", "1", "0.0"]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.xdist_group("tables")
def test_figures(module_folder: Path, programs: Path) -> None:
    run("figures.sh", cwd=module_folder, programs=programs)
    folder = module_folder / "workspace" / "figures"
    for detector in ("faster-rcnn", "retinanet"):
        assert {file.name for file in (folder / detector).iterdir()} == {f"figure_{n}.png" for n in (4, 5, 7, 10)}
    assert {file.name for file in folder.iterdir() if file.is_file()} == {"figure_8.jpg", "views.jpg", "report.html"}
    assert all(file.stat().st_size > 5_000 for file in folder.rglob("*") if file.is_file())


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.xdist_group("tables")
def test_second_run_of_a_script_makes_nothing(module_folder: Path, programs: Path) -> None:
    first = run("table11.sh", cwd=module_folder, programs=programs)
    made = {file: file.stat().st_mtime_ns for file in module_folder.glob("workspace/*/*/manifest.json")}
    assert run("table11.sh", cwd=module_folder, programs=programs) == first
    assert made == {file: file.stat().st_mtime_ns for file in module_folder.glob("workspace/*/*/manifest.json")}


STRONG = """extends = "{example}"
data = "{data}"
seeds = [0]
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_the_study_of_strong_backbones(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From start to end, with random weights in the layouts of torchvision and of DINOv3's own ConvNeXt."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    whole = convnext_tiny().state_dict()
    torch.save(whole, "imagenet.pth")
    torch.save(as_dinov3(whole), "dinov3.pth")
    (tmp_path / "small.toml").write_text(STRONG.format(example=STUDY.name, data=toy) + TINY)
    (tmp_path / STUDY.name).write_bytes(STUDY.read_bytes())
    done = aligndet("study", "small.toml", "-w", "work", "--json").json()
    assert done["status"] == "done"
    runs = {file.parent.name: json.loads(file.read_text()) for file in tmp_path.glob("work/finetune/*/manifest.json")}
    assert len(runs) == 6 and all(run["result"]["steps"] == 2 for run in runs.values())
    assert len(list(tmp_path.glob("work/pretrain-box/*/weights.pt"))) == 3
    assert len(list(tmp_path.glob("work/evaluate/*/metrics.json"))) == 6
    kinds = sorted((run["result"]["init"], run["result"]["protocol"]["backbone_weights"]) for run in runs.values())
    assert kinds == [
        ("backbone", "other"),
        ("backbone", "supervised"),
        ("file", "none"),
        ("file", "other"),
        ("file", "supervised"),
        ("scratch", "none"),
    ]
    assert {run["result"]["protocol"]["recipe"] for run in runs.values()} == {"convnext"}


def as_dinov3(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ConvNeXt without its classifier, under its authors' names, with the norm that DINOv3 has twice."""
    parts = {"0": "dwconv", "2": "norm", "3": "pwconv1", "5": "pwconv2"}
    renamed = {}
    for name, value in whole.items():
        if match := re.match(r"features\.(\d)\.(\d+)\.(?:block\.(\d)\.(\w+)|(\w+))$", name):
            place, number, part, kind, own = match.groups()
            stage = int(place) // 2
            if int(place) % 2 == 0:
                renamed[f"downsample_layers.{stage}.{number}.{own}"] = value
            elif own:
                renamed[f"stages.{stage}.{number}.gamma"] = value.flatten()
            else:
                renamed[f"stages.{stage}.{number}.{parts[part]}.{kind}"] = value
        elif name.startswith("classifier.0."):
            renamed |= {f"{at}.{name[13:]}": value for at in ("norm", "norms.3")}
    return renamed


def test_what_is_missing_is_said(pretended: Path) -> None:
    def told(script: str) -> tuple[int, str]:
        done = start(script, cwd=pretended, programs=pretended / "bin", smoke="")
        return done.returncode, done.stderr

    coco = pretended / "coco"
    assert told("table04.sh") == (3, f"table04: no folder {coco}; name the data set by COCO=FOLDER\n")
    coco.mkdir()
    folder = pretended / "VOCdevkit"
    assert told("table04.sh") == (3, f"table04: no folder {folder}; name the data set by VOC=FOLDER\n")

    def skipped(table: str, *names: str) -> str:
        files = {name: FILES[name.upper().replace("-", "_")] for name in names}
        return "".join(f"{table}: skipped {name}: no file {file}\n" for name, file in files.items())

    assert told("table06.sh") == (0, skipped("table06", "up-detr", "detreg", "SwAV"))
    names = ("moco", "pixpro", "swav", "densecl", "detco", "slotcon", "soco", "soco-coco")
    assert told("table05.sh") == (3, f"{skipped('table05', *names)}table05: all was skipped\n")
