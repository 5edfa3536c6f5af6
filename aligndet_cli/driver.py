"""Carry out a stage: from a request to an artifact, in the same steps for all. Free of torch until a stage needs it."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aligndet_cli.config import DataConfig, Sources, StageConfig, load_config, with_absolute_paths
from aligndet_cli.errors import ConfigError
from aligndet_cli.files import read_json
from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import Devices, Process, joined_world_size, resolve_devices
from aligndet_cli.processes.launch import Shown, launch, one_for_all
from aligndet_cli.stage import Conclusion, ConfigT, PlanT, Stage, Steps, find_stage
from aligndet_cli.workspace import Artifact, Workspace


@dataclass(frozen=True)
class Request:
    """A user's request to one stage; see `flags.CONTROL`."""

    stage: str
    workspace: Workspace
    sources: Sources
    resume: bool = True
    force: bool = False
    dry_run: bool = False
    shown: Shown = field(default_factory=Shown)


Status = Literal["done", "already complete", "dry run", "shard done"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request.

    Attributes:
        status: `done`, `already complete`, `dry run`, or `shard done` where other shards are missing.
        artifact: None where there is none yet: after a dry run, and while shards are missing.
        effective: the effective settings that were printed.
        conclusion: extra output of every call, and the gate that was not passed, to be raised once the result is out.
        is_main: False on all but one process under torchrun or Slurm; only that one speaks.
    """

    status: Status
    action: Literal["start", "resume", "complete"]
    folder: Path
    artifact: Artifact | None
    effective: dict[str, Any] = field(default_factory=dict)
    conclusion: Conclusion = Conclusion()
    is_main: bool = True


def execute(request: Request) -> Outcome:
    """Validate, decide, run.

    Raises:
        AlignDetError: anything the user can put right.
    """
    stage = find_stage(request.stage)
    return _execute(request, stage, stage.steps())


def _execute(request: Request, stage: Stage, steps: Steps[ConfigT, PlanT]) -> Outcome:
    asked, _ = load_config(steps.config, stage.name, request.sources)
    config = with_data(with_absolute_paths(asked), request.workspace, stage.name, stage)
    devices = Devices() if steps.has_own_workers else resolve_devices(config.runtime)

    def prepare() -> PlanT:
        return steps.prepare(config, request.workspace, resume=request.resume, force=request.force)

    with one_for_all(devices) as once:
        plan = once(prepare)
        effective = steps.describe(plan)
        is_main = _is_main()
        if is_main:
            _say(stage.name, effective)
        status = _carry_out(request, plan, steps, devices, is_main)
    output, artifact, conclusion = plan.output, None, Conclusion()
    if is_main and status in ("done", "already complete"):
        artifact = Artifact(output.folder, read_json(output.folder / "manifest.json"))
        _remember_data(request.workspace, stage, config)
    if is_main and status != "dry run":
        conclusion = steps.conclude(plan)
    return Outcome(status, output.action, output.folder, artifact, effective, conclusion, is_main)


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
    return f"which data? name it: `aligndet {command} DATA` (a COCO, VOC or YOLO root, or a folder of images)"


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
