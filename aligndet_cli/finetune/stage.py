"""`aligndet finetune`: labels and a pre-trained detector -> a fine-tuned detector."""

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from aligndet_cli.backbones import load_backbone_weights
from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.folds import fraction_of
from aligndet_cli.data.loaders import LabelBoxes, SampleStream, evaluation_batches
from aligndet_cli.data.masks import LabelMasks
from aligndet_cli.data.open import open_images
from aligndet_cli.data.stray import describe_stray_labels
from aligndet_cli.data.voc import VOC_CLASSES
from aligndet_cli.detectors import Detector, neck_norm_of
from aligndet_cli.detectors.checkpoint import DetectorFile, kept_state, read_detector, write_detector
from aligndet_cli.detectors.recipes import COCO_IMAGES, RCNN, LabelFacts, images_of_an_epoch, weights_kind
from aligndet_cli.detectors.results import predict_images
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.files import write_json
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.finetune.initial import Initial, find_initial
from aligndet_cli.finetune.transfer import LoadReport, modules_to_restart, parse_modules, transfer
from aligndet_cli.finetune.views import Resolution, build_views, resolve_resolution
from aligndet_cli.logs import logger
from aligndet_cli.metrics.measure import Metric, choose_metric, measure, open_measured
from aligndet_cli.processes.collectives import wait_for_all
from aligndet_cli.processes.devices import Devices, Process, resolve_devices
from aligndet_cli.stage import Steps
from aligndet_cli.training.batch_size import recorded_split, settle_batch_size
from aligndet_cli.training.curves import plot_curves
from aligndet_cli.training.learner import build_learner, build_to_try, train_on
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import MULTI_SCALE, SINGLE_SCALE
from aligndet_cli.training.records import merge_skipped
from aligndet_cli.training.schedules import steps_per_epoch
from aligndet_cli.training.settings import describe_settings, resolve_settings
from aligndet_cli.training.trial import GAPS_IN_FINETUNING, Trial
from aligndet_cli.workspace import Output, Workspace


@dataclass(frozen=True)
class Plan:
    """Everything that `run` needs.

    Attributes:
        masks: masks of the boxes of `image_set`, if the detector trains on them.
        num_whole: number of images of the set that `indices` are a part of.
        evaluation: images for `--evaluate-every`, or None.
    """

    config: FinetuneConfig
    output: Output
    devices: Devices
    settings: LoopSettings
    image_set: ImageSet
    masks: LabelMasks | None
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
    _check_settings(config)
    image_set, indices, masks = _open_labelled(config, workspace)
    whole = _size_of_whole_set(image_set, config.fraction)
    is_voc = {category.name for category in image_set.categories} == set(VOC_CLASSES)
    initial = find_initial(config, workspace, LabelFacts(is_voc, is_fraction=whole > len(indices)))
    name = _name(config, initial)
    scales = initial.recipe.short_sides or (SINGLE_SCALE if initial.training.is_supervised else MULTI_SCALE)
    resolution = resolve_resolution(config.resolution, initial.recipe.policy, scales)
    training, spares_memory = settle_batch_size(
        config.training,
        initial.rates,
        devices,
        recorded=recorded_split(workspace, "finetune", name, resume=resume, force=force),
        trial=_trial(config, initial, image_set, resolution),
    )
    config = config.model_copy(update={"training": training})
    num_images = images_of_an_epoch(initial.recipe, len(indices), whole) if training.epochs is None else len(indices)
    settings = resolve_settings(
        training, initial.rates, num_images=num_images, seed=config.seed, runtime=config.runtime
    )
    inputs = {"data": image_set.fingerprint, "weights": initial.content_hash}
    output = workspace.plan_output("finetune", name, config, inputs, resume=resume, force=force)
    return Plan(
        config=config,
        output=output,
        devices=devices,
        settings=replace(settings, spares_memory=spares_memory),
        image_set=image_set,
        masks=masks,
        indices=indices,
        num_whole=whole,
        initial=initial,
        resolution=resolution,
        evaluation=_evaluation_images(config, workspace, name, image_set),
    )


def _trial(config: FinetuneConfig, initial: Initial, image_set: ImageSet, resolution: Resolution) -> Trial:
    """Return steps on images of the largest size, each with as many boxes as any image has."""
    one = config.training.model_copy(update={"batch_size": 1, "accumulate": 1})
    num_classes, rates = len(image_set.categories), initial.rates
    policy = "resize" if resolution.policy == "detr" else resolution.policy  # crops are smaller
    largest = replace(resolution, policy=policy, short_sides=(max(resolution.short_sides),))
    settings = resolve_settings(one, rates, num_images=len(image_set), seed=config.seed, runtime=config.runtime)
    make_views = partial(build_views, initial.detector, initial.backbone, num_classes, largest, config.seed)
    return Trial(
        build=partial(build_to_try, make_views, rates, settings, config.runtime),
        settings=settings,
        sizes_hw=resolution.worst_sizes(),
        num_boxes=int(np.diff(image_set.offsets).max()),
        num_classes=num_classes,
        num_images=len(image_set),
        gaps=GAPS_IN_FINETUNING,
        pools_regions=initial.detector.family in RCNN,
        with_masks=initial.detector.RECIPE.needs_masks,
    )


def _check_settings(config: FinetuneConfig) -> None:
    """Refuse settings that contradict each other or cannot take effect."""
    parse_modules(config.load_modules)
    if config.fraction == 100 and "fold" in config.model_fields_set:
        raise ConfigError("--fold: goes with --fraction; all images have no folds")
    if config.init in ("backbone", "scratch"):
        idle = {"load_modules", "min_match", "keep_box_predictor"} & config.model_fields_set
        if idle:
            raise ConfigError(f"{', '.join(sorted(idle))}: no effect with --init {config.init}; leave it out")


def _open_labelled(config: FinetuneConfig, workspace: Workspace) -> tuple[ImageSet, list[int], LabelMasks | None]:
    """Return the labelled images, the indices of the fraction to train on, and masks if the detector needs them."""
    needs_masks = config.detector.RECIPE.needs_masks
    image_set = open_images(config.data, purpose="train", with_masks=needs_masks, index_dir=workspace.index_dir)
    if not image_set.has_labels or image_set.is_crowd.all():
        what = "boxes to train on in the labels of" if image_set.has_labels else "labels for"
        hint = "" if image_set.has_labels else describe_stray_labels(image_set.root)
        if len(image_set.boxes):
            hint = f"all {len(image_set.boxes)} are crowds, difficult or to be ignored"
        advice = hint or "finetune needs labelled images"
        raise DataError(f"{image_set.root}: no {what} split '{image_set.split}'; {advice}")
    indices = fraction_of(len(image_set), config.fraction, config.fold)
    masks = _masks_of(image_set, indices, config.detector.family) if needs_masks else None
    return replace(image_set, segmentations=None), indices, masks


def _masks_of(image_set: ImageSet, indices: list[int], family: str) -> LabelMasks:
    masks = LabelMasks(image_set)
    with_mask, num_boxes = masks.count(indices)
    if num_boxes and not with_mask:
        raise DataError(
            f"{image_set.annotations or image_set.root}: none of the {num_boxes} boxes has a mask, and {family} trains "
            "on masks; use --detector faster-rcnn, or labels with polygons"
        )
    if with_mask < num_boxes:
        logger.warning("%d of %d boxes have no mask: they train the boxes only", num_boxes - with_mask, num_boxes)
    return masks


def describe(plan: Plan) -> dict[str, Any]:
    """Return the effective settings, for people."""
    config, initial = plan.config, plan.initial
    num_boxes = np.diff(plan.image_set.offsets)[plan.indices].sum()
    chosen = "" if config.fraction == 100 else f" ({config.fraction:g} %, fold {config.fold})"
    if config.fraction == 100 and plan.num_whole > len(plan.indices):
        chosen = f" (by the name of its labels a part of {plan.num_whole})"
    frozen, norm_eval = initial.backbone.frozen_stages, initial.backbone.norm_eval
    neck_norm = neck_norm_of(initial.detector)
    neck = "" if neck_norm is None else f", neck norm {neck_norm}"
    neck += ", head norm batch" if initial.has_new_head_norms else ""
    return {
        "run": f"finetune/{plan.output.folder.name}",
        "data": f"{plan.image_set.root} ({plan.image_set.split}), {len(plan.image_set.categories)} classes",
        "images": f"{len(plan.indices)}{chosen}, {num_boxes} boxes",
        "detector": f"{initial.detector.family}{neck}, {initial.backbone.name}",
        "weights": initial.origin,
        "backbone": f"{_what_is_frozen(frozen)}, norms {'fixed' if norm_eval else 'trained'} ({initial.freeze_origin})",
        "resolution": plan.resolution.describe(),
        "recipe": f"{initial.recipe.name} ({initial.recipe_origin})",
        **describe_settings(config.training, initial.rates, plan.settings, plan.devices),
    }


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
    initial, num_classes = plan.initial, len(plan.image_set.categories)
    views = build_views(initial.detector, initial.backbone, num_classes, plan.resolution, config.seed)
    report = _load_weights(plan, views.model)
    if process.is_main and report is not None:
        write_json(folder / "load_report.json", report.to_json())
        for line in report.table():
            logger.info(line)
    learner = replace(
        build_learner(views, initial.rates, plan.settings, config.runtime, process),
        between=lambda done: _evaluate_now_and_then(plan, views.model, done, process),
    )
    stream = SampleStream(plan.image_set, plan.indices, LabelBoxes(plan.image_set), config.on_error, plan.masks)
    train_on(stream, learner, plan.settings, config.runtime, folder, process)
    if process.is_main:
        _finish(plan, views.model, report)
    wait_for_all(process)


def _load_weights(plan: Plan, model: Detector) -> LoadReport | None:
    """Fill a detector with its initial weights; return the report, or None if only a backbone is loaded.

    Raises:
        WeightsError: too little of the source fits.
    """
    config, initial = plan.config, plan.initial
    if initial.file is None:
        load_backbone_weights(model.backbone, initial.weights.file)
        return None
    source = read_detector(initial.file)
    restart = modules_to_restart(model, source, plan.image_set.categories, keep_box_predictor=config.keep_box_predictor)
    report = transfer(model, source.state_dict, modules=parse_modules(config.load_modules), restart=restart)
    report.check(config.min_match, str(initial.file))
    return report


def _evaluate_now_and_then(plan: Plan, model: Detector, done: int, process: Process) -> dict[str, float] | None:
    """Return COCO numbers after every `evaluate_every` epochs, from the main process; the others wait."""
    config, images = plan.config, plan.evaluation
    if images is None or config.evaluate_every is None:
        return None
    period = config.evaluate_every * steps_per_epoch(len(plan.indices), config.training.images_per_step)
    if done % period and done != plan.settings.schedule.num_steps:
        return None
    numbers = None
    if process.is_main:
        model.eval()
        batches = evaluation_batches(
            images,
            indices=range(len(images)),
            batch_size=1,
            resolution=plan.resolution.at_test,
            num_workers=0,
            device=torch.device(process.device),
        )
        predictions = predict_images(model, batches, images, images.categories)
        metric = choose_metric("auto", images)
        metrics = measure(images, predictions, metric=metric, has_masks=plan.masks is not None).metrics
        numbers = _numbers(metrics, metric)
        logger.info(f"step {done}: " + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items()))
        model.train()
    wait_for_all(process, patience_s=math.inf)  # an evaluation may take long, and all stop after it
    return numbers


def _numbers(metrics: dict[str, Any], metric: Metric) -> dict[str, float]:
    """Return the measurable ones of AP, AP50 and AP75, of the AP of masks, and of VOC's AP."""
    numbers = {key: metrics[key] for key in ("AP", "AP50", "AP75")}
    if "segm" in metrics:
        numbers["mask_AP"] = metrics["segm"]["AP"]
    if metric == "voc":
        numbers["AP12"] = metrics["voc"]["AP12"]
    return {key: value for key, value in numbers.items() if value is not None}


def _finish(plan: Plan, model: Detector, report: LoadReport | None) -> None:
    folder = plan.output.partial
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
    write_detector(folder / "weights.pt", content)
    merge_skipped(folder)
    plot_curves(folder / "metrics.jsonl", folder / "plots")
    result = {
        "steps": plan.settings.schedule.num_steps,
        "images": len(plan.indices),
        "init": plan.initial.kind,
        "backbone": plan.initial.backbone.name,
        "protocol": protocol_of(plan),
        "matched_share": None if report is None else round(report.share, 6),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    plan.output.complete(result, content=["weights.pt"])


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
        "short_sides": list(resolution.short_sides),
        "long_side": resolution.long_side,
    }


def _name(config: FinetuneConfig, initial: Initial) -> str:
    if config.name:
        return config.name
    name = f"{initial.detector.family.replace('_', '-')}-{initial.backbone.name}"
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


STEPS = Steps[FinetuneConfig, Plan](FinetuneConfig, prepare, describe, run)
