"""Loggers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow and Trackio. None of them can stop a run."""

import contextlib
import importlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from aligndet_cli.config import flatten
from aligndet_cli.errors import ConfigError, one_line
from aligndet_cli.files import read_json, write_json
from aligndet_cli.logs import logger as log
from aligndet_cli.processes.devices import Process
from aligndet_cli.workspace import run_name

LoggerName = Literal["none", "tensorboard", "wandb", "mlflow", "trackio"]
PROJECT = "aligndet"  # where the library's own environment variable names none
_MOST_PARAMETERS = 100  # of one call to MLflow


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger begins or continues.

    Attributes:
        config: settings by dotted path.
        start: finished steps.
        known_id: id under which the logger has begun it before; None: it has not.
    """

    folder: Path
    stage: str
    name: str
    config: Mapping[str, Any]
    start: int
    known_id: str | None = None


class RunLogger(Protocol):
    """One logger. Its library is imported in `start`; whatever it raises ends the logging, not the run."""

    def start(self, run: LoggedRun) -> str:
        """Begin or continue the run, and return the id to continue it with."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log numbers after `step` finished steps."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """End a run that is complete; `result` has numbers and words by dotted path."""

    def fail(self, reason: str) -> None:
        """End a run that was stopped or has failed; it may be continued later."""


class TensorBoard:
    """Event files in `tensorboard/` of the run."""

    def start(self, run: LoggedRun) -> str:
        """Open the folder; what was logged after the step to continue from is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.start + 1)
        return "tensorboard"

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers at once, for who looks on."""
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Close the file."""
        self._writer.close()

    def fail(self, reason: str) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, online or offline as its own settings say; its files lie in `wandb/` of the run."""

    def start(self, run: LoggedRun) -> str:
        """Begin the run, or continue the one of the known id."""
        run_id = run.known_id or uuid.uuid4().hex[:12]
        self._run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id,
            name=run.name,
            job_type=run.stage,
            dir=str(run.folder),
            config=dict(run.config),
            allow_val_change=True,
            resume="allow",
            settings={"console": "off", "login_timeout": 60.0},
        )
        return run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers; wandb itself leaves out steps that it has already."""
        self._run.log(dict(numbers), step=step)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Put the result into the summary, and end the run."""
        self._run.summary.update(dict(result))
        self._run.finish(exit_code=0)

    def fail(self, reason: str) -> None:
        """End the run as failed."""
        self._run.summary.update({"stopped": reason})
        self._run.finish(exit_code=1)


class Mlflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says."""

    def start(self, run: LoggedRun) -> str:
        """Begin the run with its settings, or continue the one of the known id."""
        self._mlflow = importlib.import_module("mlflow")
        if run.known_id is not None:
            self._mlflow.start_run(run_id=run.known_id)
            return run.known_id
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            self._mlflow.set_experiment(PROJECT)
        run_id = str(self._mlflow.start_run(run_name=f"{run.stage}/{run.name}").info.run_id)
        settings = list(run.config.items())
        for first in range(0, len(settings), _MOST_PARAMETERS):
            self._mlflow.log_params(dict(settings[first : first + _MOST_PARAMETERS]))
        return run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers."""
        self._mlflow.log_metrics(dict(numbers), step=step)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Log the result, and end the run."""
        is_number = {key: isinstance(value, int | float) for key, value in result.items()}
        self._mlflow.log_metrics({f"result/{key}": float(result[key]) for key in result if is_number[key]})
        self._mlflow.set_tags({key: str(result[key]) for key in result if not is_number[key]})
        self._mlflow.end_run()

    def fail(self, reason: str) -> None:
        """End the run as failed."""
        self._mlflow.set_tags({"stopped": reason})
        self._mlflow.end_run(status="FAILED")


class Trackio:
    """A run of Trackio, which knows runs by their names."""

    def start(self, run: LoggedRun) -> str:
        """Begin the run, or continue the one of the known name."""
        self._trackio = importlib.import_module("trackio")
        name = run.known_id or f"{run.stage}-{run.name}-{uuid.uuid4().hex[:6]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._trackio.init(project=project, name=name, config=dict(run.config), resume="allow")
        return name

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the numbers."""
        self._trackio.log(dict(numbers), step=step)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Log the numbers of the result, and end the run."""
        numbers = {f"result/{key}": value for key, value in result.items() if isinstance(value, int | float)}
        self._trackio.log(numbers)
        self._trackio.finish()

    def fail(self, reason: str) -> None:
        """End the run."""
        self._trackio.finish()


_KINDS: dict[str, Callable[[], RunLogger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def as_names(value: Any) -> Any:
    """Return the names in `a,b` as a list; other values are left to the validation."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


def check_loggers(names: Sequence[str]) -> tuple[LoggerName, ...]:
    """Return the loggers that are asked for, each once and without `none`.

    Raises:
        ConfigError: `none` stands beside others, or one of them is not installed.
    """
    asked = tuple(name for name in get_args(LoggerName) if name in names and name != "none")
    if asked and "none" in names:
        raise ConfigError(f"--logger {','.join(names)}: none goes without others")
    for name in asked:
        if not _is_installed(name):
            raise ConfigError(f"--logger {name}: not installed; pip install 'aligndet[{name}]'")
    return asked


def _is_installed(name: str) -> bool:
    if name in sys.modules:
        return True
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder `wandb/` passes for a package without origin


class Loggers:
    """The loggers of a run; each of them is left out from its first error on, with one warning."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self._live: dict[str, RunLogger] = {name: _KINDS[name]() for name in names}
        self._is_started = False

    def start(self, start: int) -> None:
        """Begin or continue the run after `start` finished steps."""
        if not self._live:
            return
        self._is_started = True
        file = self.folder / "resume" / "loggers.json"
        ids = dict(read_json(file)) if file.exists() else {}
        config = dict(flatten(read_json(self.folder / "config.json")))
        run = LoggedRun(self.folder, self.folder.parent.name, run_name(self.folder), config, start)
        self._each(lambda name, one: ids.update({name: one.start(replace(run, known_id=ids.get(name)))}))
        file.parent.mkdir(exist_ok=True)
        write_json(file, ids)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log numbers after `step` finished steps."""
        self._each(lambda _, one: one.log(step, numbers))

    def finish(self, result: Mapping[str, Any]) -> None:
        """End a run that is complete; of `result`, lists and missing values are left out."""
        shown = {key: value for key, value in flatten(result) if isinstance(value, str | int | float)}
        self._end(lambda _, one: one.finish(shown))

    def fail(self, reason: str) -> None:
        """End a run that was stopped or has failed."""
        self._end(lambda _, one: one.fail(one_line(reason)))

    def _end(self, action: Callable[[str, RunLogger], object]) -> None:
        if self._is_started:
            self._each(action)
        self._live = {}

    def _each(self, action: Callable[[str, RunLogger], object]) -> None:
        for name, one in list(self._live.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):  # stdout is the command's
                    action(name, one)
            except (Exception, SystemExit) as error:
                del self._live[name]
                told = one_line(f"{type(error).__name__}: {error}".strip().splitlines()[0])
                log.warning(f"--logger {name}: {told}; the run goes on without it, metrics.jsonl has all numbers")


@contextlib.contextmanager
def open_loggers(names: Sequence[str], folder: Path, process: Process) -> Iterator[Loggers]:
    """Yield the loggers of the main process, none on others; the training starts them, and an error ends them."""
    loggers = Loggers(names if process.is_main else (), folder)
    try:
        yield loggers
    except BaseException as error:
        loggers.fail(str(error) or type(error).__name__)
        raise
    loggers.finish({})
