"""`aligndet pretrain-image`: images -> a backbone trained on them."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from aligndet_cli.backbones import Backbone, BackboneConfig, BackboneWeights, build_backbone
from aligndet_cli.backbones.build import require_single
from aligndet_cli.backbones.checks import check_weights
from aligndet_cli.backbones.from_timm import is_of_timm
from aligndet_cli.backbones.teacher import Teacher, find_teacher
from aligndet_cli.backbones.weights import find_backbone_weights, load_backbone_weights
from aligndet_cli.config import NO_WEIGHTS
from aligndet_cli.data.loaders import SampleStream
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.files import write_bytes
from aligndet_cli.logs import logger
from aligndet_cli.pretrain_image.config import PretrainImageConfig
from aligndet_cli.pretrain_image.health import judge
from aligndet_cli.pretrain_image.labels import ImageData, NoBoxes, open_data
from aligndet_cli.pretrain_image.method import ImageMethod
from aligndet_cli.pretrain_image.methods import Inputs, build_method
from aligndet_cli.pretrain_image.methods.supervised import Supervised
from aligndet_cli.pretrain_image.probe import Probe, score
from aligndet_cli.pretrain_image.recipes import (
    OF_SOME,
    RECIPES,
    choose_batch_size,
    choose_momentum,
    choose_queue,
    choose_rates,
)
from aligndet_cli.pretrain_image.task import ImageTask
from aligndet_cli.processes.collectives import wait_for_all
from aligndet_cli.processes.devices import Devices, Process, resolve_devices
from aligndet_cli.stage import Steps
from aligndet_cli.training.batch_size import recorded_split
from aligndet_cli.training.checkpoint import serialise
from aligndet_cli.training.curves import plot_curves
from aligndet_cli.training.learner import Trainable, build_learner, train_on
from aligndet_cli.training.loggers import open_loggers
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.placement import place
from aligndet_cli.training.recipe import Rates
from aligndet_cli.training.records import merge_skipped
from aligndet_cli.training.settings import check_batch_split, describe_settings, resolve_settings
from aligndet_cli.workspace import Output, Workspace


@dataclass(frozen=True)
class Plan:
    """Everything that `run` needs.

    Attributes:
        weights: weights to start from.
        queue_size, momentum: of methods that use them.
        teacher: of `distill`.
    """

    config: PretrainImageConfig
    output: Output
    devices: Devices
    settings: LoopSettings
    rates: Rates
    data: ImageData
    weights: BackboneWeights
    queue_size: int
    momentum: float
    teacher: Teacher | None


def prepare(config: PretrainImageConfig, workspace: Workspace, *, resume: bool = True, force: bool = False) -> Plan:
    """Find images and labels, work out the recipe, and decide what to do.

    Raises:
        AlignDetError: anything that the user can put right.
    """
    require_single(config.backbone.name, "pretrain-image")
    _check_method(config)
    devices = resolve_devices(config.runtime)
    data = _open(config, workspace)
    name = config.name or f"{config.method}-{config.backbone.slug}"
    batch_size = config.training.batch_size
    if batch_size == "auto":
        # A resumed run keeps its batch size, even on another number of devices.
        recorded = recorded_split(workspace, "pretrain-image", name, resume=resume, force=force)
        parts = devices.world_size * config.training.accumulate
        batch_size = recorded.batch_size if recorded else choose_batch_size(config.method, len(data.indices), parts)
    training = config.training.model_copy(update={"batch_size": batch_size})
    check_batch_split(training, devices)
    config = config.model_copy(update={"training": training})

    def settle(rates: Rates) -> LoopSettings:
        return resolve_settings(training, rates, num_images=len(data.indices), seed=config.seed, runtime=config.runtime)

    num_steps = settle(RECIPES[config.method].rates).schedule.num_steps
    rates = choose_rates(config.method, config.optimizer, num_steps, batch_size)
    weights = find_backbone_weights(_start_of(config), workspace, offline=config.runtime.offline)
    inputs = {"data": data.fingerprint, "backbone weights": weights.content_hash}
    teacher = None
    if config.teacher is not None:
        teacher = find_teacher(config.teacher, workspace, offline=config.runtime.offline)
        inputs["teacher"] = teacher.weights.content_hash
    output = workspace.plan_output("pretrain-image", name, config, inputs, resume=resume, force=force)
    queue_size = config.queue_size or choose_queue(len(data.indices), batch_size)
    momentum = choose_momentum(config.method, num_steps) if config.momentum is None else config.momentum
    return Plan(config, output, devices, settle(rates), rates, data, weights, queue_size, momentum, teacher)


def look_ahead(config: PretrainImageConfig, workspace: Workspace, _pending: Collection[str]) -> None:
    """See `Steps`."""
    require_single(config.backbone.name, "pretrain-image")
    _check_method(config)
    resolve_devices(config.runtime)
    _open(config, workspace)
    check_weights(_start_of(config), workspace, offline=config.runtime.offline)
    if config.teacher is not None and (config.runtime.offline or not is_of_timm(config.teacher)):
        find_teacher(config.teacher, workspace, offline=config.runtime.offline)


def _open(config: PretrainImageConfig, workspace: Workspace) -> ImageData:
    data = open_data(config.data, seed=config.seed, index_dir=workspace.index_dir)
    if config.method == "supervised" and data.classes is None:
        raise DataError(
            f"{data.images.root}: --method supervised needs images in one folder per class (CLASS/x.jpg, or "
            "train/CLASS/x.jpg); the other methods need no labels"
        )
    return data


def _start_of(config: PretrainImageConfig) -> BackboneConfig:
    """Return the backbone; "auto" weights are random here: those of an earlier run must be asked for."""
    start = config.backbone
    return start.model_copy(update={"weights": NO_WEIGHTS}) if start.weights == "auto" else start


def idle(method: str) -> tuple[str, ...]:
    """See `Steps`; of a method that there is not none."""
    uses = next((recipe.uses for name, recipe in RECIPES.items() if name == method), OF_SOME)
    return tuple(setting for setting in OF_SOME if setting not in uses)


def _check_method(config: PretrainImageConfig) -> None:
    """Refuse settings that the method has no use for, and a missing teacher."""
    recipe, defaults = RECIPES[config.method], PretrainImageConfig()
    for setting in idle(config.method):
        if getattr(config, setting) != getattr(defaults, setting):
            raise ConfigError(f"{setting}: no effect on --method {config.method}; leave it out")
    if "teacher" in recipe.uses and config.teacher is None:
        raise ConfigError(f"--method {config.method}: needs a network to learn from; give --teacher FILE or timm:NAME")
    known = (recipe.rates.optimizer, "adamw")
    if config.optimizer not in (None, *known):
        raise ConfigError(f"optimizer: --method {config.method} trains with {' or '.join(known)}")


def describe(plan: Plan) -> dict[str, Any]:
    """Return the effective settings, for people."""
    config, data = plan.config, plan.data
    labels = "none: no probe of what was learned"
    if data.probe is not None:
        what = "images" if data.probe.test.boxes is None else "boxes"
        labels = f"{len(data.probe.train)} {what} to probe with, {len(data.probe.test)} to test on"
    return {
        "run": f"pretrain-image/{plan.output.folder.name}",
        "data": f"{data.images.root} ({data.images.format}, split {data.images.split})",
        "images": f"{len(data.indices)}" + (f" of {len(data.classes.names)} classes" if data.classes else ""),
        "labels": labels,
        "method": config.method,
        "backbone": f"{config.backbone.name}, weights to start from: {plan.weights.origin}",
        "views": f"{config.image_size} x {config.image_size}",
        **_describe_method(plan),
        **describe_settings(config.training, plan.rates, plan.settings, plan.devices),
    }


def _describe_method(plan: Plan) -> dict[str, Any]:
    """Return the effective settings that not every method has."""
    config, recipe = plan.config, RECIPES[plan.config.method]
    told = {
        "queue_size": ("queue", plan.queue_size),
        "momentum": ("momentum", f"{plan.momentum:g}{', rising to 1' if recipe.momentum_rises else ''}"),
        "temperature": ("temperature", config.temperature),
        "teacher": ("teacher", plan.teacher and f"{plan.teacher.name}, {plan.teacher.weights.origin}"),
    }
    return dict(told[setting] for setting in told if setting in recipe.uses)


def run(plan: Plan, process: Process) -> None:
    """Train, and write weights, curves and verdict."""
    config, folder = plan.config, plan.output.partial
    if process.is_main:
        plan.output.begin(config)
    wait_for_all(process)
    task = _build_task(plan)
    with open_loggers(plan.settings.loggers, folder, process) as loggers:
        train_on(_trainable(plan, task, process), config.runtime, folder, process, loggers)
        if process.is_main:
            result = _finish(plan, task.method, process)
            loggers.finish(result)
            plan.output.complete(result, content=["weights.pt"])
    wait_for_all(process)


def rebuild(plan: Plan, process: Process) -> Trainable:
    """Return what `run` trains, with the weights that it starts from."""
    return _trainable(plan, _build_task(plan), process)


def _trainable(plan: Plan, task: ImageTask, process: Process) -> Trainable:
    learner = build_learner(task, plan.rates, plan.settings, plan.config.runtime, process)
    stream = SampleStream(plan.data.images, plan.data.indices, NoBoxes(), plan.config.on_error)
    aspects = np.ones(len(plan.data.indices))  # views are squares: any images go together
    return Trainable(learner, stream, plan.settings, aspects)


def _build_task(plan: Plan) -> ImageTask:
    config, recipe, classes = plan.config, RECIPES[plan.config.method], plan.data.classes
    if config.min_area is not None:
        views = tuple(replace(view, min_area=config.min_area) for view in recipe.views)
        recipe = replace(recipe, views=views)
    inputs = Inputs(plan.queue_size, len(classes.names) if classes else 0, plan.teacher)
    return ImageTask(
        build_method(config, _initial_backbone(plan), inputs),
        recipe,
        side=config.image_size,
        class_ids=classes.class_ids if classes else None,
        momentum=plan.momentum,
        settings=plan.settings,
    )


def _initial_backbone(plan: Plan) -> Backbone:
    torch.manual_seed(plan.config.seed)
    backbone = build_backbone(plan.config.backbone)
    backbone.use_levels(("c5",))
    load_backbone_weights(backbone, plan.weights.file)
    return backbone


def _finish(plan: Plan, method: ImageMethod, process: Process) -> dict[str, Any]:
    """Write weights and curves, judge them, and return the result."""
    folder = plan.output.partial
    state = method.backbone.torchvision_state()
    if isinstance(method, Supervised):
        state |= {f"{method.backbone.classifier}.{name}": value for name, value in method.fc.state_dict().items()}
    weights = {name: value.cpu().contiguous() for name, value in state.items()}
    write_bytes(folder / "weights.pt", serialise(weights))
    merge_skipped(folder)
    plot_curves(folder / "metrics.jsonl", folder / "plots")
    before, after = _probe(plan, method, process)
    health = judge(folder / "metrics.jsonl", before, after, best=method.best)
    logger.info(f"{health['verdict']}: {health['explanation']}")
    return {
        "verdict": health.pop("verdict"),
        **({"knn": after["knn"], "linear": after["linear"]} if after else {}),
        **({"knn_at_start": before["knn"], "linear_at_start": before["linear"]} if before else {}),
        "steps": plan.settings.schedule.num_steps,
        "images": len(plan.data.indices),
        "method": plan.config.method,
        **plan.weights.terms(),
        **({"teacher": plan.teacher.name, **plan.teacher.weights.terms("teacher_licence")} if plan.teacher else {}),
        **health,
    }


def _probe(
    plan: Plan, method: ImageMethod, process: Process
) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Return the probe's scores before and after training; None without labels or readable images to test on."""
    probe: Probe | None = plan.data.probe
    if probe is None:
        return None, None
    start = _initial_backbone(plan)
    place(start, replace(process, world_size=1))
    side = plan.config.image_size
    try:
        return score(start, probe, side), score(method.backbone, probe, side)
    except DataError as error:  # the training is worth keeping without a probe
        logger.warning(f"no probe of what was learned: {error}")
        return None, None


STEPS = Steps[PretrainImageConfig, Plan](
    PretrainImageConfig, prepare, describe, run, rebuild=rebuild, look_ahead=look_ahead, idle=idle
)
