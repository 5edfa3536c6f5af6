"""`aligndet pretrain-box`: proposals -> a detector whose neck and head are pre-trained."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from aligndet_cli.artifacts.clusters import ClusterLabels
from aligndet_cli.backbones import BackboneConfig, BackboneWeights
from aligndet_cli.backbones.checks import check_weights, refuse_idle
from aligndet_cli.backbones.weights import find_backbone_weights, require_trained
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.loaders import SampleStream
from aligndet_cli.data.sides import show_limits
from aligndet_cli.detectors import DetectorConfig, semantic_classes_of
from aligndet_cli.detectors.checkpoint import DetectorFile, kept_state, write_detector
from aligndet_cli.detectors.recipes import RCNN, told_training, weights_kind
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.logs import logger
from aligndet_cli.plotting import never_failing
from aligndet_cli.pretrain_box.boxes import ProposalBoxes, draw_images, open_proposal_data
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.health import rank_level
from aligndet_cli.pretrain_box.method import Inputs, Pretext
from aligndet_cli.pretrain_box.methods import METHODS
from aligndet_cli.pretrain_box.pictures import draw_first_views
from aligndet_cli.pretrain_box.recipes import ALL_PROPOSALS
from aligndet_cli.processes.collectives import wait_for_all
from aligndet_cli.processes.devices import Devices, Process, resolve_devices
from aligndet_cli.stage import Steps
from aligndet_cli.training.batch_size import recorded_split, settle_batch_size
from aligndet_cli.training.curves import plot_curves
from aligndet_cli.training.learner import Trainable, build_learner, build_to_try, train_on
from aligndet_cli.training.loggers import open_loggers
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import Rates, Recipe
from aligndet_cli.training.records import merge_skipped
from aligndet_cli.training.settings import describe_settings, resolve_settings
from aligndet_cli.training.trial import GAPS_IN_PRETRAINING, Trial, worst_sizes
from aligndet_cli.workspace import Artifact, Output, Workspace


@dataclass(frozen=True)
class Plan:
    """Everything that `run` needs.

    Attributes:
        embedder: weights of a second backbone, if any are asked for.
    """

    config: PretrainBoxConfig
    recipe: Recipe
    output: Output
    devices: Devices
    settings: LoopSettings
    image_set: ImageSet
    boxes: ProposalBoxes
    indices: list[int]
    proposals_name: str
    weights: BackboneWeights
    embedder: BackboneWeights | None = None


def check(config: PretrainBoxConfig) -> None:
    """Refuse detectors and settings that the method has no use for.

    Raises:
        ConfigError: there is one.
    """
    METHODS[config.method].check(config)
    if num_classes := semantic_classes_of(config.detector):
        raise ConfigError(
            f"detector.semantic_classes = {num_classes}: pre-training has no classes of pixels; leave it out here, and "
            "give it to finetune"
        )
    if config.freeze_backbone:
        refuse_idle(config.backbone, config.training.layer_decay, "--no-freeze-backbone")


def idle(method: str) -> tuple[str, ...]:
    """See `Steps`; of a method that there is not none."""
    return next((one.idle for name, one in METHODS.items() if name == method), ())


def look_ahead(config: PretrainBoxConfig, workspace: Workspace, pending: Collection[str]) -> None:
    """See `Steps`."""
    check(config)
    resolve_devices(config.runtime)
    if "backbone.weights" not in pending:
        stage = "pretrain-box" if config.freeze_backbone else None
        check_weights(config.backbone, workspace, offline=config.runtime.offline, trained_for=stage)
    if config.embedder is not None:
        with _about_the_embedder():
            check_weights(_embedder_of(config), workspace, offline=config.runtime.offline)


def prepare(config: PretrainBoxConfig, workspace: Workspace, *, resume: bool = True, force: bool = False) -> Plan:
    """Find proposals and weights, work out steps and learning rate, and decide what to do.

    Raises:
        AlignDetError: anything that the user can put right.
    """
    check(config)
    devices = resolve_devices(config.runtime)
    data = open_proposal_data(workspace, config.proposals, config.data)
    image_set, artifact, indices = data.image_set, data.artifact, data.indices
    weights = find_backbone_weights(config.backbone, workspace, offline=config.runtime.offline)
    if (told := told_training(config.backbone.method)) is not None:
        weights = replace(weights, training=told)
    recipe = config.full_recipe(weights.training)
    inputs = {
        "data": image_set.fingerprint,
        "proposals": artifact.content_hash,
        "backbone weights": weights.content_hash,
    }
    embedder = None
    if config.embedder is not None:
        with _about_the_embedder():
            embedder = find_backbone_weights(_embedder_of(config), workspace, offline=config.runtime.offline)
        inputs["embedder weights"] = embedder.content_hash
    clusters = _find_clusters(config, workspace, artifact)
    if clusters is not None:
        inputs["clusters"] = clusters.content_hash
    labels = None if clusters is None else ClusterLabels(clusters.folder)
    boxes = ProposalBoxes(data.store, data.rows, config.topk or recipe.topk, labels)
    if config.limit_boxes is not None:
        indices = draw_images(indices, boxes, config.limit_boxes, config.seed)
    name = config.name or _name_of(config)
    rates = recipe.pretrain
    recorded = recorded_split(workspace, "pretrain-box", name, resume=resume, force=force)
    training, spares_memory = settle_batch_size(
        config.training, rates, devices, recorded=recorded, trial=_trial(config, rates, boxes, len(indices))
    )
    config = config.model_copy(update={"training": training})
    settings = resolve_settings(training, rates, num_images=len(indices), seed=config.seed, runtime=config.runtime)
    settings = replace(settings, spares_memory=spares_memory)
    output = workspace.plan_output("pretrain-box", name, config, inputs, resume=resume, force=force)
    if config.freeze_backbone and output.action != "complete":
        require_trained(weights, config.backbone, "pretrain-box")
    return Plan(config, recipe, output, devices, settings, image_set, boxes, indices, artifact.name, weights, embedder)


def _embedder_of(config: PretrainBoxConfig) -> BackboneConfig:
    return config.backbone.model_copy(update={"weights": config.embedder})


@contextmanager
def _about_the_embedder() -> Iterator[None]:
    """Say in messages about a backbone's weights that the second backbone is meant."""
    try:
        yield
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"embedder: {error}") from None


def _name_of(config: PretrainBoxConfig) -> str:
    method = "" if config.method == "aligndet" else f"-{config.method}"
    return f"{config.detector.family.replace('_', '-')}-{config.backbone.slug}{method}"


def _trial(config: PretrainBoxConfig, rates: Rates, boxes: ProposalBoxes, num_images: int) -> Trial:
    """Return steps on images of the largest size, each with as many proposals as any image has."""
    one = config.training.model_copy(update={"batch_size": 1, "accumulate": 1})
    settings = resolve_settings(one, rates, num_images=num_images, seed=config.seed, runtime=config.runtime)
    views = config.views.model_copy(update={"short_side": (max(config.views.short_side),)})
    make_views = partial(build_views, config.model_copy(update={"views": views}), settings, boxes.num_classes)
    return Trial(
        build=partial(build_to_try, make_views, rates, settings, config.runtime),
        settings=settings,
        sizes_hw=worst_sizes(config.views.short_side, config.views.long_side),
        num_boxes=int(boxes.counts(range(len(boxes.rows))).max()),
        num_classes=boxes.num_classes,
        num_images=num_images,
        gaps=GAPS_IN_PRETRAINING,
        pools_regions=config.detector.family in RCNN,
    )


def _find_clusters(config: PretrainBoxConfig, workspace: Workspace, proposals: Artifact) -> Artifact | None:
    """Return the clusters of the proposals if the run trains on clusters."""
    learner = config.detector.family if config.method == "aligndet" else f"--method {config.method}"
    if not config.needs_clusters:
        if config.clusters is not None:
            raise ConfigError(f"clusters = {config.clusters}: no effect, {learner} does not train on clusters")
        return None
    fitting = [
        artifact
        for artifact in workspace.artifacts("cluster")
        if artifact.manifest["inputs"].get("proposals") == proposals.content_hash
    ]
    named = [artifact for artifact in fitting if config.clusters in (None, artifact.name)]
    if named:
        return named[-1]
    place = workspace.root / "cluster" / (config.clusters or "")
    known = f" (there are: {', '.join(artifact.name for artifact in fitting)})" if fitting else ""
    raise ConfigError(
        f"{place}: no clusters of the proposals {proposals.name}{known}, and {learner} trains on them: "
        f"run `aligndet cluster{f' --set proposals={config.proposals}' if config.proposals else ''}` first"
    )


def describe(plan: Plan) -> dict[str, Any]:
    """Return the effective settings, for people."""
    config, boxes = plan.config, plan.boxes
    chosen = "with proposals" if config.limit_boxes is None else f"with {_num_boxes(plan)} proposals (--limit-boxes)"
    told = METHODS[config.method].describe(config, plan.recipe)
    clusters = {}
    if boxes.clusters is not None:
        clusters["clusters"] = f"cluster/{boxes.clusters.folder.name}, {boxes.clusters.num_clusters} of them"
    return {
        "run": f"pretrain-box/{plan.output.folder.name}",
        "data": f"{plan.image_set.root} ({plan.image_set.split}), proposals/{plan.proposals_name}",
        "images": f"{len(plan.indices)} {chosen}, of {len(plan.image_set.file_names[: config.data.limit])}",
        **({} if "topk" in idle(config.method) else {"proposals per image": _describe_topk(config, boxes.topk)}),
        **clusters,
        **({} if config.method == "aligndet" else {"method": config.method}),
        "detector": f"{config.detector.family}, {config.backbone.name}, weights {plan.weights.origin}, "
        f"backbone {_fate_of_backbone(config)}",
        **told,
        "views": told.get("views", show_limits(config.views.short_side, config.views.long_side)),
        "recipe": f"{plan.recipe.name} ({'given' if config.recipe else 'by detector, backbone and its weights'})",
        **_describe_recipe_afterwards(plan),
        **describe_settings(config.training, plan.recipe.pretrain, plan.settings, plan.devices),
    }


def _describe_topk(config: PretrainBoxConfig, topk: int) -> str:
    is_of_method = topk != config.detector.RECIPE.topk
    origin = "given" if config.topk else config.method if is_of_method else f"{config.detector.family} recipe"
    return f"{f'best {topk}' if topk < ALL_PROPOSALS else 'all'} ({origin})"


def _describe_recipe_afterwards(plan: Plan) -> dict[str, str]:
    name = plan.config.recipe_afterwards(plan.recipe)
    return {} if name == plan.recipe.name else {"recipe of fine-tuning": f"{name} (of --method {plan.config.method})"}


def _fate_of_backbone(config: PretrainBoxConfig) -> str:
    if config.freeze_backbone:
        return "frozen"
    return "trained" if METHODS[config.method].trains_norms else "trained, its norms fixed"


def _num_boxes(plan: Plan) -> int:
    return int(plan.boxes.counts(plan.indices).sum())


def run(plan: Plan, process: Process) -> None:
    """Train, and write weights, curves and verdict."""
    config, folder = plan.config, plan.output.partial
    if process.is_main:
        plan.output.begin(config)
    wait_for_all(process)
    embedder = None if plan.embedder is None else plan.embedder.file
    views = build_views(config, plan.settings, plan.boxes.num_classes, plan.weights.file, embedder)
    task = _trainable(plan, views, process)
    with open_loggers(plan.settings.loggers, folder, process) as loggers:
        train_on(task, config.runtime, folder, process, loggers)
        if process.is_main:
            result = _finish(plan, views)
            loggers.finish(result)
            plan.output.complete(result, content=["weights.pt"])
    wait_for_all(process)


def rebuild(plan: Plan, process: Process) -> Trainable:
    """Return what `run` trains, with random weights."""
    return _trainable(plan, build_views(plan.config, plan.settings, plan.boxes.num_classes), process)


def _trainable(plan: Plan, views: Pretext, process: Process) -> Trainable:
    learner = build_learner(views, plan.recipe.pretrain, plan.settings, plan.config.runtime, process)
    stream = SampleStream(plan.image_set, plan.indices, plan.boxes, plan.config.on_error)
    return Trainable(learner, stream, plan.settings)


def build_views(
    config: PretrainBoxConfig,
    settings: LoopSettings,
    num_classes: int,
    weights: Path | None = None,
    embedder: Path | None = None,
) -> Pretext:
    """Return the module that the loop trains, on the CPU; the backbone is random without a file of weights."""
    return METHODS[config.method].build(config, Inputs(settings, num_classes, weights, embedder))


def pretrain_detector(config: PretrainBoxConfig) -> DetectorConfig:
    """Return the detector to pre-train, see `Method.detector_config`."""
    return METHODS[config.method].detector_config(config)


def _finish(plan: Plan, views: Pretext) -> dict[str, Any]:
    """Write weights and pictures, and return the result."""
    config, folder = plan.config, plan.output.partial
    content = DetectorFile(
        stage="pretrain-box",
        detector=pretrain_detector(config),
        backbone=config.backbone,
        categories=(),
        resolution=None,
        state_dict=_trained_state(views),
        extra=views.extra_parts(),
        recipe=config.recipe_afterwards(plan.recipe),
        backbone_training=METHODS[config.method].backbone_training(plan.weights.training),
    )
    write_detector(folder / "weights.pt", content)
    merge_skipped(folder)
    _draw(plan)
    health = METHODS[config.method].judge(folder / "metrics.jsonl")
    logger.info(f"{health['verdict']}: {health['explanation']}")
    return {
        "verdict": health.pop("verdict"),
        "steps": plan.settings.schedule.num_steps,
        "backbone_weights": weights_kind(plan.weights.training),
        **plan.weights.terms(),
        "images": len(plan.indices),
        "boxes": _num_boxes(plan),
        "trained_parameters": sum(p.numel() for p in views.parameters() if p.requires_grad),
        **health,
    }


def _trained_state(views: Pretext) -> dict[str, Tensor]:
    state = kept_state(views.detector, "pretrain-box")
    return {name: value for name, value in state.items() if name.partition(".")[0] not in views.left_out}


def _draw(plan: Plan) -> None:
    config, folder = plan.config, plan.output.partial
    metrics, file = folder / "metrics.jsonl", folder / "plots" / "views.jpg"
    plot_curves(metrics, file.parent, rank_level(metrics))
    stream = SampleStream(plan.image_set, plan.indices, plan.boxes, "skip")
    with never_failing(file):
        batch_size = config.training.images_per_step
        show = partial(METHODS[config.method].show, config)
        draw_first_views(file, stream, show, seed=config.seed, batch_size=batch_size)


STEPS = Steps[PretrainBoxConfig, Plan](
    PretrainBoxConfig, prepare, describe, run, rebuild=rebuild, check=check, look_ahead=look_ahead, idle=idle
)
