"""How much is logged, and where, is no part of what a run is."""

import sys
from pathlib import Path

import pytest

from aligndet_cli.config import Sources, load_config
from aligndet_cli.errors import ConfigError
from aligndet_cli.finetune.config import FinetuneConfig
from helpers.commandline import CHAIN, aligndet
from helpers.interrupting import workspace_before
from helpers.logging_libraries import OTHERS, Calls, stand_in


def loaded(*assignments: str, file: Path | None = None) -> FinetuneConfig:
    return load_config(FinetuneConfig, "finetune", Sources(file, assignments))[0]


def test_logging_refuses_no_run_also_where_it_was_counted_before() -> None:
    recorded = loaded().hashed_settings()
    assert {"training.log_every", "training.logger"}.isdisjoint(recorded)
    asked = loaded("training.log_every=3", "training.logger=tensorboard")
    before = {**recorded, "training.log_every": 10}
    del before["early_stop"], before["ema"]  # of a run before they existed
    assert not asked.changes_since(before)
    assert asked.model_copy(update={"ema": 0.9}).changes_since(before) == {"ema": "ema: None -> 0.9"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('"none"', ("none",)),
        ('"tensorboard"', ("tensorboard",)),
        ('["wandb", "mlflow"]', ("wandb", "mlflow")),
        ('"wandb, trackio"', ("wandb", "trackio")),
    ],
)
def test_loggers_are_a_word_or_a_list(tmp_path: Path, written: str, read: tuple[str, ...]) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f"training.logger = {written}\n")
    assert loaded(file=file).training.logger == read


def test_an_unknown_logger_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="training.logger.1: 'wandbb' is not a choice .*did you mean 'wandb'"):
        loaded("training.logger=mlflow,wandbb")


def test_a_finished_run_takes_other_loggers_and_refuses_what_is_not_installed(chain: Path) -> None:
    words = ("finetune", "-w", chain, *CHAIN["finetune"], "--log-every", "1")
    assert aligndet(*words).stdout.startswith("already complete")
    line = aligndet(*words, "--name", "new", "--logger", "tensorboard,wandb,mlflow,trackio", "-n", code=2).error_line()
    assert "not installed; pip install 'aligndet[" in line


@pytest.mark.parametrize("stage", ["pretrain-box", "finetune"])
@pytest.mark.parametrize("fails_at", [None, "log"])
def test_a_run_with_loggers_is_the_same_run(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, fails_at: str | None
) -> None:
    calls: dict[str, Calls] = {name: [] for name in OTHERS}
    for name in OTHERS:
        monkeypatch.setitem(sys.modules, name, stand_in(name, calls[name], fails_at=fails_at))
    workspace = workspace_before(stage, chain, tmp_path / "workspace")
    ran = aligndet(stage, "-w", workspace, *CHAIN[stage], "--logger", ",".join(OTHERS), "--json")
    [run] = (workspace / stage).iterdir()
    for file in ("weights.pt", "metrics.jsonl"):
        assert (run / file).read_bytes() == (chain / stage / run.name / file).read_bytes()
    assert ran.json()["status"] == "done"
    warnings = [line for line in ran.stderr.splitlines() if line.startswith("warning: --logger ")]
    assert len(warnings) == (2 if fails_at else 0)  # MLflow has no `log`
    assert calls["mlflow"][-1][0] == "end_run"
    if fails_at is None:
        [summary] = [call[1] for call in calls["wandb"] if call[0] == "summary"]
        assert summary["steps"] == 6
        assert [call[1] for call in calls["wandb"] if call[0] == "log"]
