"""The stages as functions: the same settings, checks and artifacts as their commands. Free of torch until one runs."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

from pydantic import BaseModel

from aligndet_cli.config import Sources, StageConfig, flatten
from aligndet_cli.driver import Outcome, Request, execute
from aligndet_cli.errors import ConfigError, Preempted, as_user_error, did_you_mean
from aligndet_cli.flags import known_settings
from aligndet_cli.logs import ProgressMode
from aligndet_cli.processes.callbacks import Callbacks, OnFile, OnNumbers, callbacks_of
from aligndet_cli.processes.launch import Shown
from aligndet_cli.processes.signals import Stopped
from aligndet_cli.stage import Stage, find_stage
from aligndet_cli.workspace import Workspace

if TYPE_CHECKING:
    from aligndet_cli.cluster.config import ClusterConfig
    from aligndet_cli.evaluate.stage import EvaluateConfig
    from aligndet_cli.finetune.config import FinetuneConfig
    from aligndet_cli.pretrain_box.config import PretrainBoxConfig
    from aligndet_cli.pretrain_image.config import PretrainImageConfig
    from aligndet_cli.proposals.stage import ProposalsConfig

ConfigT = TypeVar("ConfigT", bound=StageConfig)


class StageFunction(Generic[ConfigT]):
    """A stage as a function."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(  # noqa: PLR0913  # all but the first two by keyword
        self,
        config: ConfigT | Mapping[str, Any] | str | Path | None = None,
        workspace: str | Path | None = None,
        *,
        data: str | Path | None = None,
        resume: bool = True,
        force: bool = False,
        progress: ProgressMode = "none",
        on_step: OnNumbers | None = None,
        on_log: OnNumbers | None = None,
        on_evaluate: OnNumbers | None = None,
        on_checkpoint: OnFile | None = None,
        **settings: Any,
    ) -> Outcome:
        """Carry the stage out as its command does: start, continue, or find it complete.

        Args:
            config: settings: an instance of the stage's config class, a mapping, nested or with dotted keys such as
                `{"training.steps": 100}`, or a TOML file as for `--config`.
            workspace: folder of the artifacts ($ALIGNDET_WORKSPACE, else ./workspace).
            data: the data set, as the command's DATA (the workspace's).
            resume, force: as `--resume` and `--force`.
            progress: display of progress on stderr: auto, bar, plain or none.
            on_step, on_log, on_evaluate, on_checkpoint: called by the main process of a stage that trains, see
                `Callbacks`.
            settings: settings by the words of the command's flags, such as `batch_size=8` for `--batch-size 8`, or
                groups of them as mappings, such as `detector={"family": "fcos", "neck_channels": 64}`. They win over
                `config`.

        Returns:
            The outcome, with the `folder` of the artifact and its `result`.

        Raises:
            AlignDetError: whatever can be put right: `ConfigError`, `DataError`, `WeightsError`, `RunError`,
                `GateError`, `Preempted`. Messages name the flags of the command.
        """
        stage = find_stage(self.name)
        if progress not in get_args(ProgressMode):
            raise ConfigError(f"progress={progress!r}: write {', '.join(map(repr, get_args(ProgressMode)))}")
        callbacks = callbacks_of(on_step=on_step, on_log=on_log, on_evaluate=on_evaluate, on_checkpoint=on_checkpoint)
        request = Request(
            stage=stage.name,
            workspace=Workspace.locate(None if workspace is None else Path(workspace)),
            sources=_sources(stage, config, data, settings),
            resume=resume,
            force=force,
            shown=Shown(progress, -1, frozenset(flag.word for flag in stage.flags), callbacks),
            as_it_was=True,
        )
        return _carry_out(stage, request)


pretrain_image: "StageFunction[PretrainImageConfig]" = StageFunction("pretrain-image")
proposals: "StageFunction[ProposalsConfig]" = StageFunction("proposals")
cluster: "StageFunction[ClusterConfig]" = StageFunction("cluster")
pretrain_box: "StageFunction[PretrainBoxConfig]" = StageFunction("pretrain-box")
finetune: "StageFunction[FinetuneConfig]" = StageFunction("finetune")
evaluate: "StageFunction[EvaluateConfig]" = StageFunction("evaluate")


def _carry_out(stage: Stage, request: Request) -> Outcome:
    with _known_errors(request.shown.flags), _numerics_put_back():
        if request.shown.callbacks != Callbacks() and stage.steps().rebuild is None:
            raise ConfigError(f"{stage.name}: trains nothing, so no callback is ever called; leave them out")
        outcome = execute(request)
    if outcome.conclusion.error is not None:
        raise outcome.conclusion.error
    return outcome


def _sources(stage: Stage, config: Any, data: str | Path | None, settings: Mapping[str, Any]) -> Sources:
    """Return the settings of a call; keywords win over `config`."""
    is_file = isinstance(config, str | Path)
    if isinstance(config, BaseModel) and not isinstance(config, own := stage.steps().config):
        raise ConfigError(f"config: {type(config).__name__} is not for {stage.name}; give {own.__name__}")
    given = {} if is_file or config is None else _in_config(config)
    given |= _in_keywords(stage, settings)
    given = {
        path: (word, os.fspath(value) if isinstance(value, Path) else value) for path, (word, value) in given.items()
    }
    if data is not None:
        given["data.root"] = ("data", Path(data))
    return Sources(Path(config) if is_file else None, (), given)


def _in_config(config: StageConfig | Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the settings that a config or a mapping sets, see `Sources.flags`."""
    values = _set_values(config) if isinstance(config, BaseModel) else config
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"config: of type {type(config).__name__}, holds no settings; give a mapping or the stage's config"
        )
    return {path: (path, value) for path, value in flatten(values)}


def _set_values(model: BaseModel) -> dict[str, Any]:
    """Return the values that were set when a config was made; of a detector, its family too."""
    names = [name for name in type(model).model_fields if name in model.model_fields_set or name == "family"]
    values = {name: getattr(model, name) for name in names}
    return {name: _set_values(value) if isinstance(value, BaseModel) else value for name, value in values.items()}


def _in_keywords(stage: Stage, settings: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the settings that keywords set: words of flags, or names of settings and groups.

    Raises:
        ConfigError: the stage has no such word.
    """
    known = known_settings(stage.name)
    paths = {path.partition(".")[0]: path.partition(".")[0] for path in known}
    paths |= {flag.word.removeprefix("--").replace("-", "_"): flag.path for flag in stage.flags if flag.path}
    given: dict[str, tuple[str, Any]] = {}
    for word, value in settings.items():
        if word not in paths:
            raise ConfigError(f"{word}: no setting of {stage.name}{did_you_mean(word, list(paths))}")
        if isinstance(value, Mapping):
            given |= _in_config({word: value})
            continue
        is_list = known.get(paths[word], {}).get("kind") == "list" and not isinstance(value, list | tuple)
        given[paths[word]] = (word, [value] if is_list else value)
    return given


@contextlib.contextmanager
def _known_errors(flags: frozenset[str]) -> Iterator[None]:
    """Turn what the machine can cause, and a signal, into the errors that the command shows."""
    try:
        yield
    except Stopped as stop:
        raise Preempted(str(stop)) from None
    except Exception as error:
        known = as_user_error(error, flags)
        if known is None:
            raise
        raise known from error


@contextlib.contextmanager
def _numerics_put_back() -> Iterator[None]:
    """Leave torch's random numbers and its choice of deterministic algorithms as they are before the block."""
    import torch

    state, is_deterministic = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    is_warning, benchmark = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=is_warning)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_rng_state(state)
