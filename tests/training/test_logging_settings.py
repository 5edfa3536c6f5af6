"""How much is logged, and where, is no part of what a run is."""

from pathlib import Path

import pytest

from aligndet_cli.config import Sources, load_config
from aligndet_cli.errors import ConfigError
from aligndet_cli.finetune.config import FinetuneConfig
from helpers.commandline import CHAIN, aligndet


def loaded(*assignments: str, file: Path | None = None) -> FinetuneConfig:
    return load_config(FinetuneConfig, "finetune", Sources(file, assignments))[0]


def test_logging_refuses_no_run_also_where_it_was_counted_before() -> None:
    recorded = loaded().hashed_settings()
    assert {"training.log_every", "training.logger"}.isdisjoint(recorded)
    asked = loaded("training.log_every=3", "training.logger=tensorboard")
    before = {**recorded, "training.log_every": 10}
    del before["early_stop"], before["ema"]  # of a run before they existed
    assert asked.changes_since(before) == []
    assert asked.model_copy(update={"ema": 0.9}).changes_since(before) == ["ema: None -> 0.9"]


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
