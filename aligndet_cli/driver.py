"""From a request to an artifact: the same few steps for every stage. Free of torch until a stage needs it."""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from aligndet_cli.config import STAGES, DataConfig, Sources, StageConfig, load_config
from aligndet_cli.errors import ConfigError, GateError
from aligndet_cli.files import read_json
from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import Devices, Process, joined_world_size, resolve_devices
from aligndet_cli.processes.launch import Shown, launch, one_for_all
from aligndet_cli.workspace import Artifact, Output, Workspace

CONFIG_CLASSES = {
    "pretrain-image": "PretrainImageConfig",
    "proposals": "ProposalsConfig",
    "cluster": "ClusterConfig",
    "pretrain-box": "PretrainBoxConfig",
    "finetune": "FinetuneConfig",
    "evaluate": "EvaluateConfig",
}
_DATA_KEYS = ("root", "format", "annotations", "images")


@dataclass(frozen=True)
class Request:
    """What a user asked of one stage.

    Attributes:
        sources: where its settings come from.
        resume: continue an interrupted run.
        force: redo a finished one.
        dry_run: stop once everything is checked.
    """

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
    """What came of a request.

    Attributes:
        status: `done`, `already complete`, `dry run`, or `shard done` where other shards are missing.
        action: what was decided: `start`, `resume` or `complete`.
        artifact: None where there is none yet: after a dry run, and while shards are missing.
        effective: the effective settings that were printed.
        conclusion: what a stage adds each time: the comparison of `evaluate`, how far the shards of `proposals` are.
        failed_gate: the gate that was not passed; to be raised once the result is out.
        is_main: False on all but one process under torchrun or Slurm; only that one speaks.
    """

    status: Status
    action: Literal["start", "resume", "complete"]
    folder: Path
    artifact: Artifact | None
    effective: dict[str, Any]
    conclusion: dict[str, Any]
    failed_gate: GateError | None = None
    is_main: bool = True


def stage_module(stage: str) -> ModuleType:
    """The module `aligndet_cli.<stage>.stage`, imported when it is needed (most of them import torch)."""
    return importlib.import_module(f"aligndet_cli.{stage.replace('-', '_')}.stage")


def stage_config_class(stage: str) -> type[StageConfig]:
    """Config class of a stage."""
    config_class: type[StageConfig] = getattr(stage_module(stage), CONFIG_CLASSES[stage])
    return config_class


def execute(request: Request) -> Outcome:
    """Validate, decide, run.

    Raises:
        AlignDetError: anything the user can put right.
    """
    module = stage_module(request.stage)
    asked, _ = load_config(stage_config_class(request.stage), request.stage, request.sources)
    config = with_data(asked, request.workspace, request.stage)
    devices = Devices() if request.stage == "proposals" else resolve_devices(config.runtime)

    def prepare() -> Any:
        return module.prepare(config, request.workspace, resume=request.resume, force=request.force)

    with one_for_all(devices) as once:
        plan = once(prepare)
        output: Output = plan.output
        effective = module.describe(plan)
        is_main = _is_main()
        if is_main:
            _say(request.stage, effective)
        status = _carry_out(request, plan, devices, module.run, is_main)
    artifact = None
    if status in ("done", "already complete") and is_main:
        artifact = Artifact(output.folder, read_json(output.folder / "manifest.json"))
        _remember_data(request, config)
    conclusion, failed_gate = {}, None
    if status == "shard done":
        conclusion = module.conclude(plan)
    if artifact is not None and request.stage == "evaluate":
        conclusion = module.conclude(plan)
        try:
            module.check_gate(plan)
        except GateError as error:
            failed_gate = error
    return Outcome(status, output.action, output.folder, artifact, effective, conclusion, failed_gate, is_main)


def with_data(config: StageConfig, workspace: Workspace, command: str) -> StageConfig:
    """The config with the place of the data filled in: as given, else as the workspace remembers it.

    Raises:
        ConfigError: nobody said where the data is.
    """
    data = config.data
    if data.root is None and data.annotations is None:
        known = {key: value for key, value in (workspace.recall("data") or {}).items() if value is not None}
        if command == STAGES[-1] and "annotations" in known:  # the labels that were trained on
            known = {key: known[key] for key in ("root", "format") if key in known and "root" in known}
        if not known and data.images is None:
            raise ConfigError(_ask_for_data(workspace, command))
        given = {key: value for key, value in data.model_dump(exclude_unset=True).items() if value is not None}
        data = DataConfig.model_validate({**known, **given})
    absolute = {key: value.resolve() for key in ("root", "annotations", "images") if (value := getattr(data, key))}
    return config.model_copy(update={"data": data.model_copy(update=absolute)})


def _ask_for_data(workspace: Workspace, command: str) -> str:
    if command in ("cluster", "pretrain-box"):
        return f"{workspace.root / 'proposals'} not found: run `aligndet proposals DATA` first"
    if command == STAGES[-1] and workspace.recall("data") is not None:
        return "which images? the workspace remembers only labels for training: use --annotations FILE --images DIR"
    return f"which data? name it: `aligndet {command} DATA` (a COCO, VOC or YOLO root, or a folder of images)"


def _carry_out(
    request: Request, plan: Any, devices: Devices, run: Callable[[Any, Process], None], is_main: bool
) -> Status:
    output: Output = plan.output
    if request.dry_run:
        return "dry run"
    if output.action == "complete":
        return "already complete"
    with output.lock() if is_main and not output.is_shared else contextlib.nullcontext():
        if output.action == "resume" and is_main and not output.is_shared:
            logger.info(f"continuing {output.folder}, which was interrupted")
        if request.stage == "proposals":
            if is_main:  # it has worker processes of its own
                run(plan, Process(progress=request.shown.progress))
        else:
            launch(run, plan, devices, request.shown)
    is_unfinished = output.is_shared and (output.partial / "manifest.json").exists()
    return "shard done" if is_unfinished else "done"


def _say(stage: str, effective: dict[str, Any]) -> None:
    width = max(len(key) for key in effective)
    logger.info(f"aligndet {stage}")
    for key, value in effective.items():
        if value is None:
            continue
        logger.info(f"  {key.replace('_', ' '):<{width}}  {value}")


def _remember_data(request: Request, config: StageConfig) -> None:
    """`proposals` says what the workspace is about; other stages only where nothing was said before.

    `pretrain-image` never does: its images are often others than those with the objects.
    """
    if request.stage == "pretrain-image":
        return
    if request.stage == "proposals" or request.workspace.recall("data") is None:
        data = config.data.model_dump(mode="json")
        request.workspace.remember("data", {key: data[key] for key in _DATA_KEYS})


def _is_main() -> bool:
    if joined_world_size() is None:
        return True
    import torch.distributed as dist

    return dist.get_rank() == 0
