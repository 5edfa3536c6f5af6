"""`aligndet finetune`: labels and a pre-trained detector -> a fine-tuned detector."""

import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from aligndet_cli.backbones.checks import refuse_idle
from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.loaders import LabelBoxes, SampleStream
from aligndet_cli.data.masks import LabelMasks
from aligndet_cli.data.pixel_maps import PixelMaps
from aligndet_cli.data.sides import fold_sides
from aligndet_cli.data.voc import VOC_CLASSES
from aligndet_cli.detectors import Detector, DetectorConfig
from aligndet_cli.detectors.checkpoint import DetectorFile, kept_state, write_detector
from aligndet_cli.detectors.recipes import COCO_IMAGES, LabelFacts, images_of_an_epoch, weights_kind
from aligndet_cli.errors import ConfigError
from aligndet_cli.files import write_json
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.finetune.initial import Initial, find_initial, load_initial, resolution_of
from aligndet_cli.finetune.labels import check_settings, look_ahead, open_labelled, pixel_maps_of
from aligndet_cli.finetune.measuring import Measuring
from aligndet_cli.finetune.transfer import LoadReport
from aligndet_cli.finetune.trial import largest_trial
from aligndet_cli.finetune.views import LabelledViews, Resolution, build_views
from aligndet_cli.logs import logger
from aligndet_cli.metrics.measure import open_measured
from aligndet_cli.processes.collectives import wait_for_all
from aligndet_cli.processes.devices import Devices, Process, resolve_devices
from aligndet_cli.stage import Steps
from aligndet_cli.training.average import MovingAverage
from aligndet_cli.training.batch_size import recorded_split, settle_batch_size
from aligndet_cli.training.curves import plot_curves
from aligndet_cli.training.learner import Trainable, build_learner, train_on
from aligndet_cli.training.loggers import open_loggers
from aligndet_cli.training.loop import Learner, LoopSettings
from aligndet_cli.training.records import merge_skipped
from aligndet_cli.training.schedules import steps_per_epoch
from aligndet_cli.training.settings import describe_settings, resolve_settings
from aligndet_cli.workspace import Output, Workspace


@dataclass(frozen=True)
class Plan:
    """Everything that `run` needs.

    Attributes:
        masks: masks of the boxes of `image_set`, if the detector trains on them.
        pixel_maps: classes of its pixels, likewise.
        num_whole: number of images of the set that `indices` are a part of.
        evaluation: images for `--evaluate-every`, or None.
    """

    config: FinetuneConfig
    output: Output
    devices: Devices
    settings: LoopSettings
    image_set: ImageSet
    masks: LabelMasks | None
    pixel_maps: PixelMaps | None
    indices: list[int]
    num_whole: int
    initial: Initial
    resolution: Resolution
    evaluation: ImageSet | None


def prepare(config: FinetuneConfig, workspace: Workspace, *, resume: bool = True, force: bool = False) -> Plan:
    """Find data and weights, work out the recipe, and decide what to do.

    Raises:
        AlignDetError: anything that the user can put right.
    """
    devices = resolve_devices(config.runtime)
    check_settings(config)
    image_set, indices, masks = open_labelled(config, workspace)
    whole = _size_of_whole_set(image_set, config.fraction)
    is_voc = {category.name for category in image_set.categories} == set(VOC_CLASSES)
    initial = find_initial(config, workspace, LabelFacts(is_voc, is_fraction=whole > len(indices)))
    inputs = {"data": image_set.fingerprint, "weights": initial.content_hash}
    pixel_maps = pixel_maps_of(config, initial.detector, image_set)
    if pixel_maps is not None:
        inputs["pixel maps"] = pixel_maps.check(indices)
    if initial.backbone.frozen_stages == 4:
        refuse_idle(config.backbone, config.training.layer_decay, "free some stages")
    name = _name(config, initial)
    resolution = resolution_of(initial, config)
    training, spares_memory = settle_batch_size(
        config.training,
        initial.rates,
        devices,
        recorded=recorded_split(workspace, "finetune", name, resume=resume, force=force),
        trial=largest_trial(config, initial, image_set, resolution),
    )
    config = config.model_copy(update={"training": training})
    num_images = images_of_an_epoch(initial.recipe, len(indices), whole) if training.epochs is None else len(indices)
    settings = resolve_settings(
        training, initial.rates, num_images=num_images, seed=config.seed, runtime=config.runtime
    )
    output = workspace.plan_output("finetune", name, config, inputs, resume=resume, force=force)
    return Plan(
        config=config,
        output=output,
        devices=devices,
        settings=replace(settings, spares_memory=spares_memory),
        image_set=image_set,
        masks=masks,
        pixel_maps=pixel_maps,
        indices=indices,
        num_whole=whole,
        initial=initial,
        resolution=resolution,
        evaluation=_evaluation_images(config, workspace, name, image_set),
    )


def describe(plan: Plan) -> dict[str, Any]:
    """Return the effective settings, for people."""
    config, initial = plan.config, plan.initial
    num_boxes = np.diff(plan.image_set.offsets)[plan.indices].sum()
    chosen = "" if config.fraction == 100 else f" ({config.fraction:g} %, fold {config.fold})"
    if config.fraction == 100 and plan.num_whole > len(plan.indices):
        chosen = f" (by the name of its labels a part of {plan.num_whole})"
    frozen, norm_eval = initial.backbone.frozen_stages, initial.backbone.norm_eval
    return {
        "run": f"finetune/{plan.output.folder.name}",
        "data": f"{plan.image_set.root} ({plan.image_set.split}), {len(plan.image_set.categories)} classes",
        "images": f"{len(plan.indices)}{chosen}, {num_boxes} boxes",
        "detector": f"{initial.detector.family}{_describe_norms(initial.detector)}, {initial.backbone.name}",
        "weights": initial.origin,
        "backbone": f"{_what_is_frozen(frozen)}, norms {'fixed' if norm_eval else 'trained'} ({initial.freeze_origin})",
        **_describe_pixel_maps(plan.pixel_maps),
        "resolution": plan.resolution.describe(),
        "recipe": f"{initial.recipe.name} ({initial.recipe_origin})",
        **_describe_extras(config),
        **describe_settings(config.training, initial.rates, plan.settings, plan.devices),
    }


def _describe_norms(detector: DetectorConfig) -> str:
    """Return the norm of the neck, and norms elsewhere that the family does not usually have."""
    settings = detector.model_dump()
    told = "" if "neck_norm" not in settings else f", neck norm {settings['neck_norm']}"
    if "head_norm" in settings and settings["head_norm"] != type(detector).model_fields["head_norm"].default:
        told += f", head norm {settings['head_norm']}"
    return told + (", norms first" if settings.get("pre_norm") else "")


def _describe_pixel_maps(maps: PixelMaps | None) -> dict[str, str]:
    return {} if maps is None else {"semantic branch": f"{maps.num_classes} classes of pixels, {maps.folder}"}


def _describe_extras(config: FinetuneConfig) -> dict[str, str]:
    """Return what `--evaluate-every`, `--early-stop` and `--ema` ask for."""
    extras = {}
    if config.evaluate_every is not None:
        epochs = "epoch" if config.evaluate_every == 1 else f"{config.evaluate_every} epochs"
        patience = "" if config.early_stop is None else f", the end after {config.early_stop} without a better number"
        extras["evaluation"] = f"every {epochs}{patience}"
    if config.ema is not None:
        extras["weights to keep"] = f"moving average, decay {config.ema:g}"
    return extras


def _what_is_frozen(stages: int | str) -> str:
    if stages == -1:
        return "nothing frozen"
    return "stem frozen" if stages == 0 else f"stem and {stages} {'stage' if stages == 1 else 'stages'} frozen"


def run(plan: Plan, process: Process) -> None:
    """Load, train, and write weights, load report and curves."""
    config, folder = plan.config, plan.output.partial
    if process.is_main:
        plan.output.begin(config)
    wait_for_all(process)
    torch.manual_seed(config.seed)
    views = _views(plan)
    report = load_initial(views.model, plan.initial, config, plan.image_set.categories)
    if process.is_main and report is not None:
        write_json(folder / "load_report.json", report.to_json())
        for line in report.table():
            logger.info(line)
    learner, measuring, kept = _build_learner(plan, views, process)
    task = Trainable(learner, _stream(plan), plan.settings)
    with open_loggers(plan.settings.loggers, folder, process) as loggers:
        train_on(task, config.runtime, folder, process, loggers)
        if process.is_main:
            result = _finish(plan, kept, views.model, report, measuring)
            loggers.finish(result)
            plan.output.complete(result, content=["weights.pt"])
    wait_for_all(process)


def _views(plan: Plan) -> LabelledViews:
    initial, num_classes = plan.initial, len(plan.image_set.categories)
    return build_views(initial.detector, initial.backbone, num_classes, plan.resolution, plan.config.seed)


def _stream(plan: Plan) -> SampleStream:
    boxes = LabelBoxes(plan.image_set)
    return SampleStream(plan.image_set, plan.indices, boxes, plan.config.on_error, plan.masks, plan.pixel_maps)


def rebuild(plan: Plan, process: Process) -> Trainable:
    """Return what `run` trains, with random weights."""
    views = _views(plan)
    learner = build_learner(views, plan.initial.rates, plan.settings, plan.config.runtime, process)
    return Trainable(learner, _stream(plan), plan.settings)


def _build_learner(plan: Plan, views: LabelledViews, process: Process) -> tuple[Learner, Measuring | None, Detector]:
    """Return the learner, the evaluations of `--evaluate-every`, and the detector to evaluate and to keep."""
    learner = build_learner(views, plan.initial.rates, plan.settings, plan.config.runtime, process)
    kept: Detector = views.model
    if plan.config.ema is not None and process.is_main:  # nobody else evaluates or writes
        average = MovingAverage(views.model, plan.config.ema)
        learner = replace(learner, state={**learner.state, "average": average}, after_step=average.update)
        kept = cast(Detector, average.model)
    measuring = _measuring(plan, kept, process)
    if measuring is not None:
        learner = replace(learner, between=measuring.between, is_over=measuring.is_over)
    return learner, measuring, kept


def _measuring(plan: Plan, model: Detector, process: Process) -> Measuring | None:
    """Return the evaluations of `--evaluate-every`; None if there are none."""
    config, images = plan.config, plan.evaluation
    if images is None or config.evaluate_every is None:
        return None
    return Measuring(
        model,
        images,
        plan.resolution.at_test,
        has_masks=plan.masks is not None,
        period=config.evaluate_every * steps_per_epoch(len(plan.indices), config.training.images_per_step),
        num_steps=plan.settings.schedule.num_steps,
        patience=config.early_stop,
        folder=plan.output.partial,
        write=partial(_write_weights, plan, model),
        process=process,
    )


def _write_weights(plan: Plan, model: Detector, file: Path) -> None:
    content = DetectorFile(
        stage="finetune",
        detector=plan.initial.detector,
        backbone=plan.initial.backbone,
        categories=tuple(plan.image_set.categories),
        resolution=plan.resolution.at_test,
        state_dict=kept_state(model, "finetune"),
        recipe=plan.initial.recipe.name,
        backbone_training=plan.initial.training,
    )
    write_detector(file, content)


def _finish(
    plan: Plan, model: Detector, trained: Detector, report: LoadReport | None, measuring: Measuring | None
) -> dict[str, Any]:
    """Write weights and curves, and return the result.

    Args:
        model: the detector to keep: `trained`, or the average of its weights.
    """
    folder, num_steps = plan.output.partial, plan.settings.schedule.num_steps
    _write_weights(plan, model, folder / "weights.pt")
    merge_skipped(folder)
    plot_curves(folder / "metrics.jsonl", folder / "plots")
    result = {
        "steps": num_steps,
        "images": len(plan.indices),
        "init": plan.initial.kind,
        "backbone": plan.initial.backbone.name,
        "protocol": protocol_of(plan),
        **plan.initial.weights.terms(),
        "matched_share": None if report is None else round(report.share, 6),
        "trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
    }
    if measuring is None:
        return result
    measuring.best.put_in_place()
    best = measuring.best.now
    if measuring.stopped_at is not None:
        result |= {"steps": measuring.stopped_at, "planned_steps": num_steps}
    return result | {"best": None if best is None else asdict(best)}


def protocol_of(plan: Plan) -> dict[str, Any]:
    """Return the settings by which reports recognise the paper's runs."""
    schedule, resolution = plan.settings.schedule, plan.resolution
    return {
        "backbone_weights": weights_kind(plan.initial.training),
        "recipe": plan.initial.recipe.name,
        "batch_size": plan.config.training.images_per_step,
        "steps": schedule.num_steps,
        "drop_steps": list(schedule.drop_steps),
        "policy": resolution.policy,
        "short_sides": fold_sides(resolution.short_sides),
        "long_side": resolution.long_side,
    }


def _name(config: FinetuneConfig, initial: Initial) -> str:
    if config.name:
        return config.name
    name = f"{initial.detector.family.replace('_', '-')}-{initial.backbone.slug}"
    if initial.kind != "pretrain":
        name += f"-{initial.kind}"
    return name if config.fraction == 100 else f"{name}-f{config.fold}-p{config.fraction:g}"


def _size_of_whole_set(image_set: ImageSet, fraction: float) -> int:
    """Return the number of images of the whole data set.

    Args:
        fraction: percent of `image_set` that is used. With 100, the name of its split or label file may say that it is
            a part itself: `instances_train2017.1@10.json` is 10 % of its set.
    """
    name = image_set.split if image_set.annotations is None else image_set.annotations.stem
    percent = re.search(r"\.\d+@(\d+(?:\.\d+)?)$", name)
    if fraction < 100 or percent is None:
        return len(image_set)
    share = float(percent[1]) / 100
    return next((count for count in COCO_IMAGES if int(share * count) == len(image_set)), round(len(image_set) / share))


def _evaluation_images(config: FinetuneConfig, workspace: Workspace, name: str, image_set: ImageSet) -> ImageSet | None:
    if config.evaluate_every is None:
        return None
    data = DataConfig.model_validate({**config.data.model_dump(), "split": None, "limit": None})
    if data.annotations is not None:
        raise ConfigError("--evaluate-every: does not go with --annotations, there is no validation split to find")
    has_masks = config.detector.RECIPE.needs_masks
    return open_measured(data, image_set.categories, name, has_masks=has_masks, index_dir=workspace.index_dir)


STEPS = Steps[FinetuneConfig, Plan](FinetuneConfig, prepare, describe, run, rebuild=rebuild, look_ahead=look_ahead)
