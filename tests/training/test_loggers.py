"""Loggers of other libraries, which are not installed here: stand-ins write down the calls, and fail where told to."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from aligndet_cli.errors import ConfigError, Preempted
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.loggers import Loggers, check_loggers, open_loggers
from helpers.logging_libraries import OTHERS, Calls, stand_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An unfinished run."""
    folder = tmp_path / "finetune" / ".small.partial"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 3, "data": {"limit": None}}))
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Calls]:
    """What is called of each library."""
    found: dict[str, Calls] = {name: [] for name in OTHERS}
    for name in OTHERS:
        monkeypatch.setitem(sys.modules, name, stand_in(name, found[name]))
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return found


def log_a_run(folder: Path, names: tuple[str, ...] = OTHERS, start: int = 0) -> Loggers:
    with open_loggers(names, folder, Process()) as loggers:
        loggers.start(start)
        loggers.log(10, {"metrics/loss_cls": 0.5})
        loggers.finish({"steps": 12, "verdict": "healthy", "best": {"value": 0.25}, "missing": None, "drops": [8]})
    return loggers


def test_each_library_is_told_settings_numbers_and_result(
    folder: Path, calls: dict[str, Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    log_a_run(folder)
    settings, result = {"seed": 3, "data.limit": None}, {"steps": 12, "verdict": "healthy", "best.value": 0.25}
    begun, logged, summary, finished = calls["wandb"]
    asked = {key: begun[1][key] for key in ("project", "name", "job_type", "config", "resume")}
    assert asked == {
        "project": "aligndet",
        "name": "small",
        "job_type": "finetune",
        "config": settings,
        "resume": "allow",
    }
    assert logged == ("log", {"metrics/loss_cls": 0.5}, {"step": 10})
    assert (summary[1], finished) == (result, ("finish", {}, {"exit_code": 0}))
    assert calls["mlflow"] == [
        ("set_experiment", "aligndet"),
        ("start_run", {"run_name": "finetune/small"}),
        ("log_params", settings),
        ("log_metrics", {"metrics/loss_cls": 0.5}, {"step": 10}),
        ("log_metrics", {"result/steps": 12.0, "result/best.value": 0.25}, {}),
        ("set_tags", {"verdict": "healthy"}),
        ("end_run", {}, {}),
    ]
    assert [call[0] for call in calls["trackio"]] == ["init", "log", "log", "finish"]
    assert calls["trackio"][0][1]["name"].startswith("finetune-small-")
    spoken = capsys.readouterr()
    assert spoken.out == "" and "wandb speaks" in spoken.err


def test_a_run_that_was_stopped_is_ended_and_continued_under_its_id(folder: Path, calls: dict[str, Calls]) -> None:
    with pytest.raises(Preempted), open_loggers(OTHERS, folder, Process()) as loggers:
        loggers.start(0)
        raise Preempted("stopped by SIGTERM")
    assert calls["wandb"][-1] == ("finish", {}, {"exit_code": 1})
    assert calls["mlflow"][-2:] == [
        ("set_tags", {"stopped": "stopped by SIGTERM"}),
        ("end_run", {}, {"status": "FAILED"}),
    ]
    assert calls["trackio"][-1][0] == "finish"
    first = {name: calls[name][0][1] for name in ("wandb", "trackio")}
    for name in OTHERS:
        calls[name].clear()
    log_a_run(folder, start=4)
    assert calls["wandb"][0][1]["id"] == first["wandb"]["id"]
    assert calls["trackio"][0][1]["name"] == first["trackio"]["name"]
    assert calls["mlflow"][0] == ("start_run", {"run_id": "run-1"})


PLACES = [
    *(("wandb", place) for place in ("init", "log", "summary", "finish")),
    *(("mlflow", place) for place in ("start_run", "log_params", "log_metrics", "end_run")),
    *(("trackio", place) for place in ("init", "log", "finish")),
]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_a_logger_that_fails_anywhere_warns_once_and_leaves_the_others_alone(
    folder: Path,
    calls: dict[str, Calls],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    place: str,
) -> None:
    monkeypatch.setattr(logging.getLogger("aligndet"), "propagate", True)
    monkeypatch.setitem(sys.modules, name, stand_in(name, calls[name], fails_at=place))
    log_a_run(folder)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"--logger {name}: ConnectionError: no route to {name}; the run goes on without it")
    assert all(calls[other][-1][0] in ("finish", "end_run") for other in OTHERS if other != name)


@pytest.mark.parametrize("error", [ImportError("numpy is too new"), SystemExit(1), RuntimeError()])
def test_a_library_that_cannot_be_imported_is_left_out(
    folder: Path,
    calls: dict[str, Calls],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    monkeypatch.setattr(logging.getLogger("aligndet"), "propagate", True)

    class Finder:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "wandb":
                raise error

    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    log_a_run(folder)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["--logger wandb"]
    assert calls["mlflow"][-1][0] == "end_run"


def test_only_the_main_process_logs(folder: Path, calls: dict[str, Calls]) -> None:
    with open_loggers(OTHERS, folder, Process(rank=1, world_size=2)) as loggers:
        loggers.start(0)
        loggers.log(1, {"a": 1.0})
    assert calls == {name: [] for name in OTHERS}


def test_what_is_not_installed_is_said_before_the_run(calls: dict[str, Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_loggers(["trackio", "wandb", "wandb"]) == ("wandb", "trackio")
    assert check_loggers(["none"]) == check_loggers([]) == ()
    with pytest.raises(ConfigError, match="none goes without others"):
        check_loggers(["none", "wandb"])
    monkeypatch.delitem(sys.modules, "mlflow")
    with pytest.raises(ConfigError, match=r"--logger mlflow: not installed; pip install 'aligndet\[mlflow\]'"):
        check_loggers(["mlflow"])


def test_a_folder_of_that_name_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # what wandb leaves in the current folder
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="not installed"):
        check_loggers(["wandb"])
