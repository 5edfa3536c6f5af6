"""Every script in examples/ runs, small, on the toy set. Those of the paper's tables share one workspace.

At full scale these ask for the paper's experiments and for no others, which is seen without running them.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import ForkServer

from aligndet_cli.data.toy import draw_toy_data
from aligndet_cli.finetune.stage import FinetuneConfig
from aligndet_cli.pretrain_box.stage import PretrainBoxConfig
from aligndet_cli.report.published import Published, find_published, published_numbers
from aligndet_cli.study.plan import StageRun, plan_runs
from aligndet_cli.study.spec import load_study
from aligndet_cli.training.schedules import build_schedule
from aligndet_cli.workspace import Artifact, Workspace, write_json

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = ("common.sh", "effect.sh")  # sourced by others; hours long at its smallest, and a study like the rest
SCRIPTS = sorted(file.name for file in EXAMPLES.glob("*.sh") if file.name not in SHARED)
TABLES = [name for name in SCRIPTS if name.startswith("table")]
OTHERS = [name for name in SCRIPTS if name not in TABLES and name != "figures.sh"]
NUM_COCO, NUM_VOC = (118_287, 5_000), (16_551, 4_952)  # images to train on and to measure
NUM_BOXES = 123_456  # of the pre-training run that the pretended command has made
WEIGHTS = ("moco_v2_800ep_pretrain.pth.tar", "pixpro_base_r50_400ep_md5_919c6612.pth", "swav_800ep_pretrain.pth.tar")
SIMMIM = "simmim_pretrain__swin_base__img192_window6__800ep.pth"
# In the place of `aligndet`: runs nothing, and says that all is complete.
PRETENDED = """\
#!/bin/sh
case "$*" in *--dry-run) printf 'complete     pretrain-box/one\\ncomplete     finetune/one\\n' ;; esac
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples-toy")
    draw_toy_data(folder, seed=0, num_train=11, num_val=5, size_hw=(96, 128))
    return folder


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def programs(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `aligndet` in it."""
    folder = tmp_path_factory.mktemp("bin")
    forks.write_command(folder)
    return folder


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """A folder with an `aligndet` that does nothing, and with what it claims to have made."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "aligndet"
    command.write_text(PRETENDED)
    command.chmod(0o755)
    for stage in ("pretrain-box", "finetune"):
        result = {"boxes": NUM_BOXES, "images": 1, "steps": 1, "trained_parameters": 1}
        times = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T01:30:00+00:00"}
        folder = tmp_path / "workspace" / stage / "one"
        folder.mkdir(parents=True)
        write_json(folder / "manifest.json", {"stage": stage, "result": result, **times})
    return tmp_path


def start(script: str, *words: str, cwd: Path, programs: Path, smoke: str = "1") -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "SMOKE": smoke, "OMP_NUM_THREADS": "1", "ALIGNDET_OFFLINE": "1"}
    for name in ("COCO", "VOC", "IMAGENET", "ALIGNDET_WORKSPACE", "MOCO", "PIXPRO", "SWAV", "SIMMIM"):
        environment.pop(name, None)
    command = ["bash", str(EXAMPLES / script), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def run(script: str, *words: str, cwd: Path, programs: Path, smoke: str = "1") -> str:
    """What a script printed; it must succeed."""
    done = start(script, *words, cwd=cwd, programs=programs, smoke=smoke)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "not drawn" not in done.stderr
    return done.stdout


def studies_of(script: str, cwd: Path, workspace: str = "workspace") -> list[list[StageRun]]:
    """The runs of the studies that a script has written, to be made in a workspace."""
    files = sorted((cwd / "workspace" / "studies").glob(f"{Path(script).stem}*.toml"))
    assert files
    return [plan_runs(load_study(file), Workspace(cwd / workspace)) for file in files]


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
def test_table(script: str, shared_folder: Path, programs: Path) -> None:
    """Ends with a row for each fine-tuned run, all of them measured."""
    lines = run(script, cwd=shared_folder, programs=programs).splitlines()
    [top] = [place for place, line in enumerate(lines) if line.startswith("detector ")]
    begin, end = lines[top].index(" start ") + 1, lines[top].index(" n ") + 1
    asked = []
    for runs in studies_of(script, shared_folder):
        asked += [one.config().to_json()["label"] for one in runs if one.stage == "finetune"]
    assert sorted(line[begin:end].strip() for line in lines[top + 1 :]) == sorted(asked)
    assert all(re.match(r"1 +\d+\.\d\b", line[end:]) for line in lines[top + 1 :])
    assert (script == "table12.sh") == (top > 0)
    if script == "table12.sh":  # millions of parameters, images, steps and hours, beside the paper's
        assert [line.split()[0] for line in lines[1:top]] == ["pretrain-box", "finetune"]
        assert lines[1].split()[1:6] == ["0.40", "M", "11", "1", "0.0"]


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.xdist_group("tables")
def test_figures(shared_folder: Path, programs: Path) -> None:
    run("figures.sh", cwd=shared_folder, programs=programs)
    folder = shared_folder / "workspace" / "figures"
    for detector in ("faster-rcnn", "retinanet"):
        assert {file.name for file in (folder / detector).iterdir()} == {f"figure_{n}.png" for n in (4, 5, 7, 10)}
    assert {file.name for file in folder.iterdir() if file.is_file()} == {"figure_8.jpg", "views.jpg", "report.html"}
    assert all(file.stat().st_size > 5_000 for file in folder.rglob("*") if file.is_file())


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.xdist_group("tables")
def test_second_run_of_a_script_makes_nothing(shared_folder: Path, programs: Path) -> None:
    first = run("table11.sh", cwd=shared_folder, programs=programs)
    made = {file: file.stat().st_mtime_ns for file in shared_folder.glob("workspace/*/*/manifest.json")}
    assert run("table11.sh", cwd=shared_folder, programs=programs) == first
    assert made == {file: file.stat().st_mtime_ns for file in shared_folder.glob("workspace/*/*/manifest.json")}


@pytest.mark.parametrize("script", [name for name in TABLES if name != "table12.sh"])
def test_full_scale_is_the_table_of_the_paper(script: str, pretended: Path) -> None:
    """Every number of the table would stand beside a run, and every run beside a number of the paper."""
    for folder in ("coco", "VOCdevkit", "imagenet"):
        (pretended / folder).mkdir()
    for name in (*WEIGHTS, SIMMIM):
        (pretended / name).touch()
    run(script, cwd=pretended, programs=pretended / "bin", smoke="")
    found: set[Published] = set()
    missing = []
    for runs in studies_of(script, pretended, "empty"):
        for label, published in numbers_of(runs):
            if published is None:
                missing.append(label)
            else:
                found.add(published)
    number = str(int(script[5:7]))
    of_table = {one for one in published_numbers().values() if number in re.findall(r"\d+", one.source)}
    assert of_table and of_table <= found
    assert missing == (["ImageNet subset"] if script == "table08.sh" else [])


def numbers_of(runs: list[StageRun]) -> Iterator[tuple[str, Published | None]]:
    """Labels of the fine-tuned runs of a study, and the paper's numbers for them if they had been carried out."""
    by_key = {one.key: one for one in runs}
    for one in runs:
        config = one.config()
        if one.stage == "finetune":
            assert isinstance(config, FinetuneConfig)
            begun = next((by_key[key] for key in one.needs if key.startswith("pretrain-box/")), None)
            is_voc = config.data.root is not None and config.data.root.name == "VOCdevkit"
            num_train, num_val = NUM_VOC if is_voc else NUM_COCO
            evaluation = Pretended(Path("evaluation"), {"result": {"images": num_val}})
            tuned = carried_out(config, int(config.fraction / 100 * num_train), init=config.init)
            before = None
            if begun is not None:
                pretraining = begun.config()
                assert isinstance(pretraining, PretrainBoxConfig)
                assert pretraining.limit_boxes in (None, NUM_BOXES)
                # As many boxes are fewer images.
                before = carried_out(pretraining, NUM_COCO[0] if pretraining.limit_boxes is None else 90_000)
            assert config.label is not None
            yield config.label, find_published(evaluation, tuned, before)


class Pretended(Artifact):
    """An artifact that is nowhere."""

    def config(self) -> dict[str, object]:
        return dict(self.manifest["config"])


def carried_out(config: FinetuneConfig | PretrainBoxConfig, num_images: int, init: str = "pretrain") -> Artifact:
    """What a stage would have made of so many images."""
    training, recipe = config.training, config.detector.RECIPE
    schedule = build_schedule(
        training.schedule or recipe.pretrain.schedule,
        epochs=training.epochs,
        steps=training.steps,
        num_images=num_images,
        batch_size=int(training.batch_size),
    )
    kind = init if init == "backbone" else "file"
    result = {"images": num_images, "steps": schedule.num_steps, "init": kind, "backbone": config.backbone.name}
    return Pretended(Path("run"), {"config": config.to_json(), "result": result})


def test_what_is_missing_is_said(pretended: Path) -> None:
    def told(script: str) -> tuple[int, str]:
        done = start(script, cwd=pretended, programs=pretended / "bin", smoke="")
        return done.returncode, done.stderr

    coco = pretended / "coco"
    assert told("table04.sh") == (3, f"table04: no folder {coco}; name the data set by COCO=FOLDER\n")
    coco.mkdir()
    folder = pretended / "VOCdevkit"
    assert told("table04.sh") == (3, f"table04: no folder {folder}; name the data set by VOC=FOLDER\n")
    assert told("table06.sh") == (0, "table06: skipped SwAV: no file swav_800ep_pretrain.pth.tar\n")
    skipped = [
        f"table05: skipped {name}: no file {file}"
        for name, file in zip(("moco", "pixpro", "swav"), WEIGHTS, strict=True)
    ]
    assert told("table05.sh") == (3, "\n".join([*skipped, "table05: all was skipped\n"]))
