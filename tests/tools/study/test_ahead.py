"""What would stop a run of a study is found before the first run."""

from collections.abc import Collection
from pathlib import Path

import pytest
from PIL import Image

from aligndet_cli.backbones import BackboneConfig, weights
from aligndet_cli.backbones.checks import check_weights
from aligndet_cli.config import STAGES
from aligndet_cli.errors import AlignDetError, WeightsError
from aligndet_cli.stage import find_stage
from aligndet_cli.tools.study.ahead import look_ahead, pending_of
from aligndet_cli.tools.study.plan import StageRun, plan_runs
from aligndet_cli.tools.study.spec import load_study
from aligndet_cli.workspace import Workspace
from helpers.commandline import aligndet
from helpers.studies import SMALL, TWO_STARTS, write_study

NO_WEIGHTS = '"backbone.weights" = "none"\n'
COMMON = SMALL.partition("[settings.proposals]")[0] + NO_WEIGHTS
TEACHER = """
[settings.pretrain-image]
method = "distill"
teacher = "gone.pth"
"""


def planned(folder: Path, toy: Path, text: str, detector: str = "retinanet") -> list[StageRun]:
    study = load_study(write_study(folder, text, head=f'data = "{toy}"\ndetectors = ["{detector}"]\nseeds = [0, 1]'))
    return plan_runs(study, Workspace(folder / "ws"))


def problem_of(runs: list[StageRun], folder: Path, complete: Collection[str] = ()) -> str:
    states = {run.key: "complete" if run.stage in complete else "missing" for run in runs}
    try:
        look_ahead(runs, states, Workspace(folder / "ws"))
    except AlignDetError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ""),
        (
            '[settings.proposals]\ncue_backbone = "resnet18"\ncue_weights = "IMAGENET1K_V9"',
            "start 'AlignDet', proposals: backbone weights '",
        ),
        (
            '[settings.proposals]\nimport_file = "gone.json"',
            "start 'AlignDet', proposals: --import {here}/gone.json: no such file",
        ),
        (
            '[settings.pretrain-box]\n"backbone.weights" = "gone.pth"',
            "start 'AlignDet', pretrain-box: backbone weights {here}/gone.pth: no such file",
        ),
        (
            '[settings.pretrain-box]\n"backbone.weights" = "auto"',
            "start 'AlignDet', pretrain-box: pretrain-box: its backbone stays as it is, so it needs trained weights",
        ),
        (TEACHER, "start 'AlignDet', pretrain-image: --teacher {here}/gone.pth: no such file"),
        # All runs of both starts: two problems.
        (
            "[settings.finetune]\nearly_stop = 3",
            "start 'from scratch', finetune: --early-stop: needs --evaluate-every, which finds out what is better (and "
            "1 more)",
        ),
        (
            '[settings.evaluate]\n"runtime.compile" = true',
            "start 'from scratch', evaluate: runtime.compile: evaluate passes over the images once",
        ),
    ],
)
def test_the_first_problem_is_told_with_its_start_and_stage(
    text: str, said: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = COMMON.replace(NO_WEIGHTS, "") if text == TEACHER else COMMON
    found = problem_of(planned(tmp_path, toy, common + text + TWO_STARTS), tmp_path)
    said = said.format(ws=tmp_path / "ws", here=tmp_path)
    assert found.startswith(said) and bool(found) == bool(said) and "\n" not in found


def test_the_data_must_serve_all_stages(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (60, 50), (9, number, 9)).save(tmp_path / "photos" / f"{number}.png")
    found = problem_of(planned(tmp_path, tmp_path / "photos", SMALL + TWO_STARTS), tmp_path)
    assert found.startswith(f"start 'from scratch', finetune: {tmp_path}/photos: no labels for split")
    text = f'evaluate_data = "{tmp_path}/photos"\n{SMALL}{TWO_STARTS}'
    found = problem_of(planned(tmp_path, toy, text), tmp_path)
    assert found.startswith("start 'from scratch', evaluate: ") and "photos" in found


def test_complete_runs_are_not_checked(tmp_path: Path) -> None:
    runs = planned(tmp_path, tmp_path / "gone", SMALL + TWO_STARTS)
    assert "/gone" in problem_of(runs, tmp_path)
    assert problem_of(runs, tmp_path, complete=STAGES) == ""


def test_what_is_yet_to_be_made_is_not_missed(tmp_path: Path) -> None:
    runs = {run.key: run for run in planned(tmp_path, tmp_path, SMALL + TWO_STARTS, "detr")}
    tuned = runs["finetune/detr-aligndet-s0"]
    assert pending_of(tuned, ()) == {"init"} and pending_of(tuned, {"pretrain-box/detr"}) == frozenset()
    assert pending_of(runs["pretrain-box/detr"], {"proposals/proposals"}) == {"clusters"}
    assert pending_of(runs["finetune/detr-from-scratch-s0"], ()) == frozenset()
    assert {run.start for run in runs.values() if run.stage != "finetune"} == {"AlignDet", "from scratch"}


def test_every_stage_looks_ahead() -> None:
    nothing = find_stage("proposals").steps().__dataclass_fields__["look_ahead"].default
    assert all(find_stage(stage).steps().look_ahead is not nothing for stage in STAGES)


def test_nothing_is_downloaded_for_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "cached_or_downloaded", lambda *_, **__: pytest.fail("downloads"))
    workspace = Workspace(tmp_path)
    check_weights(BackboneConfig(name="resnet18", weights="DEFAULT"), workspace, offline=False)
    with pytest.raises(WeightsError, match="IMAGENET1K_V9"):
        check_weights(BackboneConfig(name="resnet18", weights="IMAGENET1K_V9"), workspace, offline=False)


def test_the_dry_run_ends_with_the_line(toy: Path, tmp_path: Path) -> None:
    text = SMALL.replace("working_size = 96", 'import_file = "gone.json"').replace("min_size = 16\n", "") + TWO_STARTS
    study = write_study(tmp_path, text, head=f'data = "{toy}"\ndetectors = ["retinanet"]')
    for words in (("-n",), ()):
        ran = aligndet("study", study, "-w", tmp_path / "ws", *words, code=2)
        assert ("missing      finetune/retinanet-aligndet-s0" in ran.stdout) == ("-n" in words)
        line = ran.error_line()
        assert line.startswith("error: start 'AlignDet', proposals: ") and "gone.json: no such file" in line
    assert not list((tmp_path / "ws").rglob("manifest.json"))
