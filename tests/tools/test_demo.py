from pathlib import Path

import pytest

from aligndet_cli.tools import demo
from aligndet_cli.tools.demo import DemoSize, run_demo
from aligndet_cli.tools.study.quick import fit
from helpers.commandline import aligndet

pytestmark = pytest.mark.plots

SMALL = DemoSize(
    num_objects=24,
    num_train=7,
    num_val=3,
    num_clusters=3,
    backbone="method=supervised backbone.name=resnet18 image_size=32 training.steps=2 training.batch_size=2",
    model="backbone.name=resnet18 detector.neck_channels=32 detector.head_convs=1 training.batch_size=2",
    pretrain="training.steps=2 views.short_side=[64]",
    finetune="training.steps=2 resolution.short_side=[64]",
)


@pytest.mark.e2e
@pytest.mark.slow
def test_demo_runs_all_stages_and_compares(tmp_path: Path) -> None:
    report = run_demo(tmp_path, seed=0, size=SMALL)
    numbers = report.to_json()
    assert set(numbers["delta"]) == {"AP", "AP50", "AP75"}
    assert numbers["delta"]["AP"] == numbers["with"]["AP"] - numbers["without"]["AP"]
    page = (tmp_path / "workspace-0" / "report.html").read_text()
    assert report.page == tmp_path / "workspace-0" / "report.html"
    assert page.count("<img") >= 7 and "plots/compare-retinanet-resnet18-backbone-val.png" in page
    assert report.table().row_count == 3
    stages = {folder.parent.name for folder in (tmp_path / "workspace-0").glob("*/*") if folder.is_dir()}
    assert stages == {"pretrain-image", "proposals", "cluster", "pretrain-box", "finetune", "evaluate"}
    # Again: nothing is redone, the same table.
    assert run_demo(tmp_path, seed=0, size=SMALL).to_json() == numbers


@pytest.mark.e2e
@pytest.mark.slow
def test_the_same_story_on_photographs(
    toy: Path, mobilenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LABELLED_PHOTOS", 4)
    monkeypatch.setattr(demo, "PHOTO_CLUSTERS", 3)
    monkeypatch.setattr(demo, "PHOTO_STEPS", 2)
    monkeypatch.setattr(demo, "finetune_steps", lambda _: 2)
    monkeypatch.setattr(demo, "PHOTO_LR", {"backbone": 0.001, "pretrain": 0.001})
    monkeypatch.setattr(fit, "BATCH", 2)
    words = ("demo", "--photos", toy, "--backbone-weights", mobilenet, "-w", tmp_path / "demo")
    ran = aligndet(*words)
    assert "13 images of 'train' to train on, 11 to measure on ('val'); 4 of them keep their labels" in ran.stderr
    assert "\nAlignDet " in ran.stdout and "one pair is no proof: `aligndet study --quick" in ran.stdout
    workspace = tmp_path / "demo" / "photos-toy-0"
    stages = {folder.parent.name for folder in workspace.glob("*/*") if folder.is_dir()}
    assert stages == {"proposals", "cluster", "pretrain-box", "finetune", "evaluate"}
    assert "plots/compare-" in (workspace / "report.html").read_text()
    assert aligndet(*words).stdout == ran.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--backbone", "resnet18"), 2, "--backbone: goes with --photos DATA"),
        (("--offline",), 2, "--offline: goes with --photos DATA"),
        (("--photos", "nowhere"), 3, "nowhere: no such file or folder"),
        (("--photos", "{toy}", "--backbone-weights", "gone.pth"), 4, "gone.pth: no such file"),
    ],
)
def test_mistakes_are_one_line(toy: Path, tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    filled = [word.format(toy=toy) for word in words]
    assert said in aligndet("demo", *filled, "-w", tmp_path / "demo", code=code).error_line()
    assert not (tmp_path / "demo").exists()
