"""Carry out a stage: from a request to an artifact, in the same steps for all. Free of torch until a stage needs it."""

import contextlib
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aligndet_cli.config import (
    DataConfig,
    Sources,
    StageConfig,
    assign,
    flatten,
    load_config,
    validated,
    with_absolute_paths,
)
from aligndet_cli.errors import ChangedError, ConfigError
from aligndet_cli.files import read_json
from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import Devices, Process, joined_world_size, resolve_devices
from aligndet_cli.processes.launch import Shown, ask_for_deterministic_products, launch, one_for_all
from aligndet_cli.stage import Conclusion, ConfigT, PlanT, Stage, Steps, find_stage
from aligndet_cli.workspace import Artifact, Workspace


@dataclass(frozen=True)
class Request:
    """A user's request to one stage; see `flags.CONTROL`.

    Attributes:
        as_it_was: settings that nobody gave are those of the finished or interrupted run of the same name, if there is
            one; otherwise they are the defaults, and a run that had others is refused.
    """

    stage: str
    workspace: Workspace
    sources: Sources
    resume: bool = True
    force: bool = False
    dry_run: bool = False
    shown: Shown = field(default_factory=Shown)
    as_it_was: bool = False


Status = Literal["done", "already complete", "dry run", "shard done"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request.

    Attributes:
        status: `done`, `already complete`, `dry run`, or `shard done` where other shards are missing.
        artifact: None where there is none yet: after a dry run, and while shards are missing.
        effective: the effective settings that were printed.
        seconds: duration of the work; None where there was none to do.
        conclusion: extra output of every call, and the gate that was not passed, to be raised once the result is out.
        is_main: False on all but one process under torchrun or Slurm; only that one speaks.
    """

    status: Status
    action: Literal["start", "resume", "complete"]
    folder: Path
    artifact: Artifact | None
    effective: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    conclusion: Conclusion = Conclusion()
    is_main: bool = True

    @property
    def result(self) -> dict[str, Any]:
        """Summary of the artifact, and what `conclusion` adds to it; empty while there is none."""
        return {**(self.artifact.result if self.artifact else {}), **self.conclusion.result}


def execute(request: Request) -> Outcome:
    """Validate, decide, run.

    Raises:
        AlignDetError: anything the user can put right.
    """
    stage = find_stage(request.stage)
    return _execute(request, stage, stage.steps())


def _execute(request: Request, stage: Stage, steps: Steps[ConfigT, PlanT]) -> Outcome:
    asked, origins = load_config(steps.config, stage.name, request.sources)
    config = with_data(with_absolute_paths(asked), request.workspace, stage.name, stage)
    devices = Devices() if steps.has_own_workers else resolve_devices(config.runtime)
    if config.runtime.deterministic:
        ask_for_deterministic_products()

    def prepare() -> PlanT:
        return _prepare(request, stage, steps, config, origins)

    with one_for_all(devices) as once:
        plan = once(prepare)
        effective = steps.describe(plan)
        is_main = _is_main()
        if is_main:
            _say(stage.name, effective)
        began = time.monotonic()
        status = _carry_out(request, plan, steps, devices, is_main)
        seconds = time.monotonic() - began if status in ("done", "shard done") else None
    output, artifact, conclusion = plan.output, None, Conclusion()
    if is_main and status in ("done", "already complete"):
        artifact = Artifact(output.folder, read_json(output.folder / "manifest.json"))
        _remember_data(request.workspace, stage, config)
    if is_main and status != "dry run":
        conclusion = steps.conclude(plan)
    return Outcome(status, output.action, output.folder, artifact, effective, seconds, conclusion, is_main)


def _prepare(
    request: Request, stage: Stage, steps: Steps[ConfigT, PlanT], config: ConfigT, given: Collection[str]
) -> PlanT:
    """Call `prepare`; with `Request.as_it_was`, recorded settings take the place of those that were not given."""

    def prepare(config: ConfigT) -> PlanT:
        return steps.prepare(config, request.workspace, resume=request.resume, force=request.force)

    if not request.as_it_was:
        return prepare(config)
    folder, settled = None, None
    if config.name is not None:
        folder = request.workspace.begun(stage.name, config.name, resume=request.resume, force=request.force)
        settled = None if folder is None else _as_it_was(config, folder, given, stage)
    try:
        return prepare(settled or config)
    except ChangedError as error:
        changed = error
    if folder is None:  # the stage has found the name
        settled = _as_it_was(config, changed.folder, given, stage)
        if settled is not None:
            return prepare(settled)
    told = {path: text for path, text in changed.settings.items() if _is_given(path, given)} or changed.settings
    raise ChangedError(changed.state, changed.remedy, told, changed.inputs, changed.folder)


def _as_it_was(config: ConfigT, folder: Path, given: Collection[str], stage: Stage) -> ConfigT | None:
    """Return the settings with the recorded ones of a run where none was given, and tell these.

    Artifacts and files that nobody named are settings too, such as the pre-training that `finetune --init` takes; the
    data set is not.

    Returns:
        None where nothing changes, a given setting differs, or the settings are of another version of aligndet.
    """
    now, used = dict(flatten(config.to_json())), dict(flatten(read_json(folder / "config.json")))
    recorded = dict(read_json(folder / "manifest.json")["settings"])
    recorded = {path: recorded.get(path, config.value_before(path)) for path in config.hashed_settings()}
    named = {*(read.setting for read in stage.reads), "import_file"} & now.keys() & used.keys()
    recorded |= {path: used[path] for path in named}
    kept = {path: value for path, value in recorded.items() if value != now[path]}
    kept = {path: value for path, value in kept.items() if not (now[path] == "auto" and _is_given(path, given))}
    if not kept or any(_is_given(path, given) for path in kept):
        return None
    values = config.model_dump(exclude_unset=True)
    try:
        for path, value in kept.items():
            assign(values, path, value)
        settled = validated(type(config), values, {})
    except ConfigError:
        return None
    was = "interrupted" if folder.name.startswith(".") else "finished"
    logger.info(f"as in the {was} run: {', '.join(f'{path}={value}' for path, value in kept.items())}")
    return settled


def _is_given(path: str, given: Collection[str]) -> bool:
    """Return True if a setting, or a group or part of it, was given."""
    return any(one == path or one.startswith(f"{path}.") or path.startswith(f"{one}.") for one in given)


def with_data(config: ConfigT, workspace: Workspace, command: str, stage: Stage | None = None) -> ConfigT:
    """Fill in the place of the data: as given, else as the workspace remembers it.

    `stage` is None where the command is no stage.

    Raises:
        ConfigError: nobody said where the data is; the message names the command to run.
    """
    data = config.data
    if data.root is None and data.annotations is None:
        known = {key: value for key, value in (workspace.recall("data") or {}).items() if value is not None}
        if stage is not None and stage.purpose == "val" and "annotations" in known:  # the labels that were trained on
            known = {key: known[key] for key in ("root", "format") if key in known and "root" in known}
        if not known and data.images is None:
            raise ConfigError(_ask_for_data(workspace, command, stage))
        given = {key: value for key, value in data.model_dump(exclude_unset=True).items() if value is not None}
        data = DataConfig.model_validate({**known, **given})
    absolute = {key: value.resolve() for key in ("root", "annotations", "images") if (value := getattr(data, key))}
    return config.model_copy(update={"data": data.model_copy(update=absolute)})


def _ask_for_data(workspace: Workspace, command: str, stage: Stage | None) -> str:
    if stage is not None and stage.is_of_proposals:
        return f"{workspace.root / 'proposals'} not found: run `aligndet proposals DATA` first"
    if stage is not None and stage.purpose == "val" and workspace.recall("data") is not None:
        return "which images? the workspace remembers only labels for training: use --annotations FILE --images DIR"
    kind = "a COCO, VOC or YOLO root, or a folder of images"
    if stage is not None:  # the help of DATA, without what is taken by default
        kind = stage.data.partition(" (")[0].rstrip(".")
    return f"which data? name it: `aligndet {command} DATA` ({kind[0].lower()}{kind[1:]})"


def _carry_out(request: Request, plan: PlanT, steps: Steps[ConfigT, PlanT], devices: Devices, is_main: bool) -> Status:
    output = plan.output
    if request.dry_run:
        return "dry run"
    if output.action == "complete":
        return "already complete"
    with output.lock() if is_main and not output.is_shared else contextlib.nullcontext():
        if output.action == "resume" and is_main and not output.is_shared:
            logger.info(f"continuing {output.folder}, which was interrupted")
        if not steps.has_own_workers:
            launch(steps.run, plan, devices, request.shown)
        elif is_main:
            steps.run(plan, Process(progress=request.shown.progress))
    return "shard done" if output.lacks_shares else "done"


def _say(stage: str, effective: dict[str, Any]) -> None:
    width = max(len(key) for key in effective)
    logger.info(f"aligndet {stage}")
    for key, value in effective.items():
        if value is not None:
            logger.info(f"  {key.replace('_', ' '):<{width}}  {value}")


def _remember_data(workspace: Workspace, stage: Stage, config: StageConfig) -> None:
    if stage.remembers_data == "always" or (stage.remembers_data == "first" and workspace.recall("data") is None):
        workspace.remember("data", config.data.place())


def _is_main() -> bool:
    if joined_world_size() is None:
        return True
    import torch.distributed as dist

    return dist.get_rank() == 0
