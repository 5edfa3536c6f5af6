import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from aligndet_cli.driver import Outcome, Request
from aligndet_cli.errors import DataError, Preempted
from aligndet_cli.logs import logger
from aligndet_cli.stage import find_stage
from aligndet_cli.tools.study import board as study_board
from aligndet_cli.tools.study.board import Board
from aligndet_cli.tools.study.command import run_study
from aligndet_cli.tools.study.plan import StageRun
from aligndet_cli.workspace import Workspace
from helpers.commandline import aligndet, files_of
from helpers.studies import SMALL, TWO_STARTS, values_of, write_study

NUM_RUNS = 8  # proposals, one pre-training; 2 starts (one of them for 1 of 2 seeds): 3 fine-tunings and evaluations


class FakeStages:
    """Writes artifacts in place of the stages, or raises what it is told to."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.raises: dict[str, BaseException] = {}

    def execute(self, request: Request) -> Outcome:
        run = StageRun(request.stage, "", dict(request.sources.flags or {}), ())
        values = values_of(run)
        key = f"{request.stage}/{values['name']}"
        if key in self.raises:
            raise self.raises[key]
        self.done.append(key)
        folder = request.workspace.root / key
        folder.mkdir(parents=True)
        settings = {path: entry for path, entry in run.settings.items() if path != "name"}
        config = StageRun(request.stage, str(values["name"]), settings, ()).config()
        assert isinstance(config, find_stage(request.stage).steps().config)
        sources = [values.get("init"), values.get("run"), values.get("proposals")]
        parents = [str(one).removesuffix("/weights.pt").rsplit("/", 1)[-1] for one in sources if one]
        places = {"pretrain-box": "proposals", "finetune": "pretrain-box", "evaluate": "finetune"}
        inputs = {parent: f"{places[request.stage]}/{parent}" for parent in parents if parent != "scratch"}
        manifest = {"settings": config.hashed_settings(), "content_hash": key, "inputs": inputs}
        manifest |= {"finished": str(len(self.done)), "result": {}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "config.json").write_text(json.dumps(config.to_json()))
        return Outcome("done", "start", folder, None)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fake = FakeStages()
    monkeypatch.setattr(study_board, "execute", fake.execute)
    for name in ("collect_report", "look_ahead"):  # there are no data
        monkeypatch.setattr(f"aligndet_cli.tools.study.command.{name}", lambda *_, **__: None)
    return fake


@pytest.fixture
def study(tmp_path: Path) -> Path:
    text = TWO_STARTS.replace('init = "scratch"', 'init = "scratch"\nseeds = [0]')
    return write_study(tmp_path, text, head='data = "toy"\ndetectors = ["retinanet"]\nseeds = [0, 1]')


def test_finished_runs_are_skipped_and_missing_ones_made(stages: FakeStages, study: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    outcome = run_study(study, workspace, dry_run=True)
    assert {state.state for state in outcome.states} == {"missing"} and not stages.done
    outcome = run_study(study, workspace)
    assert len(stages.done) == NUM_RUNS and {state.state for state in outcome.states} == {"done"}
    stages.done.clear()
    outcome = run_study(study, workspace)
    assert not stages.done and {state.state for state in outcome.states} == {"complete"}
    # Another pre-training than the one that was fine-tuned: these runs are no longer what the study asks for.
    manifest = workspace.root / "pretrain-box" / "retinanet" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"pretrain-box/retinanet"', '"another"'))
    states = {f"{one.stage}/{one.name}": one.state for one in run_study(study, workspace, dry_run=True).states}
    assert [key for key, state in states.items() if state == "changed"] == [
        "finetune/retinanet-aligndet-s0",
        "finetune/retinanet-aligndet-s1",
    ]


def test_a_failure_stops_only_what_needs_it(stages: FakeStages, study: Path, tmp_path: Path) -> None:
    stages.raises = {
        "pretrain-box/retinanet": DataError("no boxes"),
        "evaluate/retinanet-from-scratch-s0": ValueError("a bug"),
    }
    outcome = run_study(study, Workspace(tmp_path / "ws"))
    states = {f"{one.stage}/{one.name}": (one.state, one.message) for one in outcome.states}
    assert states["finetune/retinanet-from-scratch-s0"] == ("done", "")
    assert states["evaluate/retinanet-from-scratch-s0"] == ("failed", "ValueError: a bug")
    assert states["pretrain-box/retinanet"] == ("failed", "no boxes")
    for seed in (0, 1):
        assert states[f"finetune/retinanet-aligndet-s{seed}"] == ("not run", "not run: pretrain-box/retinanet failed")
        assert states[f"evaluate/retinanet-aligndet-s{seed}"][0] == "not run"
    assert outcome.failure is not None and outcome.failure.exit_code == 1  # of the first run that failed
    assert str(outcome.failure).startswith("2 of 8 runs failed, and 4 that need them did not run")
    stages.raises = {}
    outcome = run_study(study, Workspace(tmp_path / "ws"))
    assert outcome.failure is None and len(stages.done) == NUM_RUNS


def test_a_stop_ends_the_study(stages: FakeStages, study: Path, tmp_path: Path) -> None:
    stages.raises = {"pretrain-box/retinanet": Preempted("stopped by SIGTERM")}
    with pytest.raises(Preempted):
        run_study(study, Workspace(tmp_path / "ws"))
    assert stages.done[-1] == "proposals/proposals"


def test_proposals_of_other_commands_are_used(stages: FakeStages, study: Path, tmp_path: Path) -> None:
    """Those of the same data and settings, whatever their name."""
    workspace = Workspace(tmp_path / "ws")
    run_study(study, workspace)
    (workspace.root / "proposals" / "proposals").rename(workspace.root / "proposals" / "train2017")
    states = {f"{one.stage}/{one.name}": one.state for one in run_study(study, workspace, dry_run=True).states}
    assert states["proposals/train2017"] == states["pretrain-box/retinanet"] == "complete"
    study.write_text(study.read_text().replace('data = "toy"', 'data = "other"'))
    states = {f"{one.stage}/{one.name}": one.state for one in run_study(study, workspace, dry_run=True).states}
    assert states["proposals/proposals"] == "missing"


def test_time_left_is_that_of_finished_runs_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter([0.0, 0.0, 10.0, 10.0, 10.0, 40.0, 40.0, 40.0, 40.0])
    monkeypatch.setattr(study_board.time, "monotonic", lambda: next(clock))
    runs = [StageRun("finetune", name, {}, ()) for name in "abcd"] + [StageRun("evaluate", "a", {}, ())]
    board = Board({run.key: run for run in runs}, {"finetune/d"}, jobs=2, expected={"evaluate": 2.0})
    assert board.seconds_left() is None  # of fine-tuning nothing is known
    known = Board(board.runs, {"finetune/d"}, jobs=2, expected={"finetune": 5.0, "evaluate": 1.0})
    assert known.seconds_left() == (3 * 5 + 1) / 2
    for _ in range(2):  # 10 s and 30 s: 20 s on average
        run = board.begin_next()
        assert run is not None
        board.finish(run, None)
    board.begin_next()
    # Left are c, begun just now, and the evaluation of 2 s, by two jobs.
    assert board.seconds_left() == 11


def test_a_warning_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with study_board.warnings_once():
        for _ in range(2):
            logger.warning("a box is odd")
            logger.error("a run failed")
    logger.warning("a box is odd")
    assert [record.getMessage() for record in caplog.records] == [
        "a box is odd",
        "a run failed",
        "a run failed",
        "a box is odd",
    ]


@pytest.mark.e2e
@pytest.mark.slow
def test_real_study_here_and_in_another_process(toy: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, SMALL + TWO_STARTS, head=f'data = "{toy}"\ndetectors = ["retinanet"]')
    workspace = tmp_path / "ws"
    words = ("study", study, "-w", workspace)
    found = aligndet(*words, "--json").json()
    assert found["status"] == "done" and {run["state"] for run in found["runs"]} == {"done"}
    (plain, ours) = found["report"]["rows"]
    assert (plain["label"], ours["label"]) == ("from scratch", "AlignDet")
    assert ours["summaries"]["AP50"]["delta"]["num_pairs"] == 1
    before = files_of(workspace / "evaluate")
    (workspace / "evaluate" / "retinanet-aligndet-s0").rename(tmp_path / "gone")
    # What is missing is done by another process; the rest is complete.
    ran = aligndet(*words, "--jobs", "2")
    assert "6 runs (2 finetune, 2 evaluate, 1 proposals, 1 pretrain-box), 5 complete" in ran.stderr
    after = files_of(workspace / "evaluate")
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if not name.endswith("manifest.json"))
    assert "AlignDet" in ran.stdout and "0 of 1" in ran.stdout
