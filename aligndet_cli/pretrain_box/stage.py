"""`aligndet pretrain-box`: proposals -> a detector whose neck and head are pre-trained."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from aligndet_cli.artifacts.clusters import ClusterLabels
from aligndet_cli.backbones import BackboneConfig, BackboneWeights, build_backbone
from aligndet_cli.backbones.weights import find_backbone_weights, load_backbone_weights, require_trained
from aligndet_cli.config import Frozen, StageConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.loaders import OnError, SampleStream
from aligndet_cli.detectors import DetectorConfig, neck_norm_of, settle_neck_norm
from aligndet_cli.detectors.checkpoint import OBJECTNESS, DetectorFile, kept_state, write_detector
from aligndet_cli.detectors.recipes import RCNN, recipe_for, told_training, training_of_backbone, weights_kind
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.logs import logger
from aligndet_cli.plotting import never_failing
from aligndet_cli.pretrain_box.boxes import ProposalBoxes, draw_images, open_proposal_data
from aligndet_cli.pretrain_box.health import judge, rank_level
from aligndet_cli.pretrain_box.pictures import draw_first_views
from aligndet_cli.pretrain_box.pretext import BoxPretext, Tasks
from aligndet_cli.pretrain_box.views import TwoViews, ViewsConfig
from aligndet_cli.processes.collectives import wait_for_all
from aligndet_cli.processes.devices import Devices, Process, resolve_devices
from aligndet_cli.stage import Steps
from aligndet_cli.training.batch_size import recorded_split, settle_batch_size
from aligndet_cli.training.curves import plot_curves
from aligndet_cli.training.learner import Trainable, build_learner, build_to_try, train_on
from aligndet_cli.training.loggers import open_loggers
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import ProjectorRecipe, ProjectorStart, Rates, Recipe
from aligndet_cli.training.records import merge_skipped
from aligndet_cli.training.settings import AskedRecipe, TrainingConfig, describe_settings, resolve_settings, training_of
from aligndet_cli.training.trial import GAPS_IN_PRETRAINING, Trial, worst_sizes
from aligndet_cli.workspace import Artifact, Output, Workspace


class ProjectorConfig(Frozen):
    """The MLP behind the classification features."""

    hidden_dim: int | None = Field(None, ge=1, description="Width of the projector's hidden layer (by recipe).")
    embedding_dim: int = Field(256, ge=1, description="Dimensions of an embedding.")  # the authors' selfsup_*.py
    # see `ProjectorRecipe`
    start: ProjectorStart | None = Field(None, description="Initial weights of the projector (by recipe).")

    def resolve(self, recipe: ProjectorRecipe) -> ProjectorRecipe:
        """Return the recipe with the values that are set here."""
        return ProjectorRecipe(self.hidden_dim or recipe.hidden_dim, self.start or recipe.start)


class PretrainBoxConfig(StageConfig):
    """Settings of `pretrain-box`; defaults are the paper's."""

    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {"proposals", "clusters"}
    BEFORE: ClassVar[dict[str, Any]] = {"projector.start": "kaiming"}

    detector: DetectorConfig = RetinaNetConfig()
    backbone: BackboneConfig = BackboneConfig()
    proposals: str | None = Field(None, description="Proposals to use, by name (the newest).")
    clusters: str | None = Field(None, description="Clusters to train on, if the detector needs any (the newest).")
    topk: int | None = Field(None, ge=1, description="Best N proposals per image; 100000 takes all (recipe: 50 or 70).")
    views: ViewsConfig = ViewsConfig()
    projector: ProjectorConfig = ProjectorConfig()
    temperature: float = Field(0.5, gt=0, description="Temperature of the contrastive loss.")  # the paper, eq. 4
    # the authors' selfsup_detector.py
    momentum: float = Field(0.996, ge=0, le=1, description="Momentum of the averaged detector at first; it rises to 1.")
    tasks: Tasks = Field("both", description="Losses to train with.")
    freeze_backbone: bool = Field(True, description="Keep the backbone as it is.")
    objectness: bool = Field(False, description="Train a score of objects without classes as well, to find boxes with.")
    limit_boxes: int | None = Field(None, ge=1, description="Draw images until they have N proposals (no limit).")
    recipe: AskedRecipe = Field(None, description="Recipe to train with (by detector, backbone and weights).")
    on_error: OnError = Field("skip", description="Reaction to an image that cannot be read.")
    training: TrainingConfig = TrainingConfig()

    def from_recipe(self) -> dict[str, Any]:
        """Return the values that the recipe fills in, as far as they are known without a workspace."""
        recipe = recipe_for(self.detector, self.backbone, training_of_backbone(self.backbone), asked=self.recipe)
        norm = {"detector.neck_norm": "none"} if neck_norm_of(self.detector) == "auto" else {}
        topk = {"topk": recipe.topk} if self.topk is None else {}
        projector = self.projector.resolve(recipe.projector)
        mlp = {"projector.hidden_dim": projector.hidden_dim, "projector.start": projector.start}
        return {"recipe": recipe.name, **norm, **topk, **mlp, **training_of(self.training, recipe.pretrain)}


@dataclass(frozen=True)
class Plan:
    """Everything that `run` needs."""

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


def prepare(config: PretrainBoxConfig, workspace: Workspace, *, resume: bool = True, force: bool = False) -> Plan:
    """Find proposals and weights, work out steps and learning rate, and decide what to do.

    Raises:
        AlignDetError: anything that the user can put right.
    """
    _check_objectness(config)
    if config.backbone.recompute and config.freeze_backbone:
        raise ConfigError("backbone.recompute: no effect on a frozen backbone, which keeps nothing; leave it out")
    devices = resolve_devices(config.runtime)
    data = open_proposal_data(workspace, config.proposals, config.data)
    image_set, artifact, indices = data.image_set, data.artifact, data.indices
    weights = find_backbone_weights(config.backbone, workspace, offline=config.runtime.offline)
    if (told := told_training(config.backbone.method)) is not None:
        weights = replace(weights, training=told)
    recipe = recipe_for(config.detector, config.backbone, weights.training, asked=config.recipe)
    inputs = {
        "data": image_set.fingerprint,
        "proposals": artifact.content_hash,
        "backbone weights": weights.content_hash,
    }
    clusters = _find_clusters(config, workspace, artifact)
    if clusters is not None:
        inputs["clusters"] = clusters.content_hash
    labels = None if clusters is None else ClusterLabels(clusters.folder)
    boxes = ProposalBoxes(data.store, data.rows, config.topk or recipe.topk, labels)
    if config.limit_boxes is not None:
        indices = draw_images(indices, boxes, config.limit_boxes, config.seed)
    name = config.name or f"{config.detector.family.replace('_', '-')}-{config.backbone.slug}"
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
    return Plan(config, recipe, output, devices, settings, image_set, boxes, indices, artifact.name, weights)


def _check_objectness(config: PretrainBoxConfig) -> None:
    family = config.detector.family
    if config.objectness and family in RCNN:
        raise ConfigError(f"--objectness: no effect, {family} trains such a score in any case (its RPN); leave it out")
    if config.objectness and config.tasks == "contrastive":
        raise ConfigError("--objectness: no effect with --tasks contrastive, which trains no boxes; leave one out")


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
    """Return the clusters of the proposals if the detector trains on clusters."""
    family = config.detector.family
    if not config.detector.RECIPE.needs_clusters:
        if config.clusters is not None:
            raise ConfigError(f"clusters = {config.clusters}: no effect, {family} does not train on clusters")
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
        f"{place}: no clusters of the proposals {proposals.name}{known}, and {family} trains on them: "
        f"run `aligndet cluster{f' --set proposals={config.proposals}' if config.proposals else ''}` first"
    )


def describe(plan: Plan) -> dict[str, Any]:
    """Return the effective settings, for people."""
    config, boxes = plan.config, plan.boxes
    projector = config.projector.resolve(plan.recipe.projector)
    chosen = "with proposals" if config.limit_boxes is None else f"with {_num_boxes(plan)} proposals (--limit-boxes)"
    origin = "given" if config.topk else f"{config.detector.family} recipe"
    clusters = {}
    if boxes.clusters is not None:
        clusters["clusters"] = f"cluster/{boxes.clusters.folder.name}, {boxes.clusters.num_clusters} of them"
    return {
        "run": f"pretrain-box/{plan.output.folder.name}",
        "data": f"{plan.image_set.root} ({plan.image_set.split}), proposals/{plan.proposals_name}",
        "images": f"{len(plan.indices)} {chosen}, of {len(plan.image_set.file_names[: config.data.limit])}",
        "proposals per image": f"best {boxes.topk} ({origin})",
        **clusters,
        "detector": f"{config.detector.family}, {config.backbone.name}, weights {plan.weights.origin}, "
        f"backbone {'frozen' if config.freeze_backbone else 'trained, its norms fixed'}",
        "projector": f"{projector.hidden_dim} and {config.projector.embedding_dim} wide, {projector.start} start",
        "views": f"short side {list(config.views.short_side)}, long side {config.views.long_side}",
        "recipe": f"{plan.recipe.name} ({'given' if config.recipe else 'by detector, backbone and its weights'})",
        **describe_settings(config.training, plan.recipe.pretrain, plan.settings, plan.devices),
    }


def _num_boxes(plan: Plan) -> int:
    return int(plan.boxes.counts(plan.indices).sum())


def run(plan: Plan, process: Process) -> None:
    """Train, and write weights, curves and verdict."""
    config, folder = plan.config, plan.output.partial
    if process.is_main:
        plan.output.begin(config)
    wait_for_all(process)
    views = build_views(config, plan.settings, plan.boxes.num_classes, plan.weights.file)
    task = _trainable(plan, views, process)
    with open_loggers(plan.settings.loggers, folder, process) as loggers:
        train_on(task, config.runtime, folder, process, loggers)
        if process.is_main:
            result = _finish(plan, views.pretext)
            loggers.finish(result)
            plan.output.complete(result, content=["weights.pt"])
    wait_for_all(process)


def rebuild(plan: Plan, process: Process) -> Trainable:
    """Return what `run` trains, with random weights."""
    return _trainable(plan, build_views(plan.config, plan.settings, plan.boxes.num_classes), process)


def _trainable(plan: Plan, views: TwoViews, process: Process) -> Trainable:
    learner = build_learner(views, plan.recipe.pretrain, plan.settings, plan.config.runtime, process)
    stream = SampleStream(plan.image_set, plan.indices, plan.boxes, plan.config.on_error)
    return Trainable(learner, stream, plan.settings)


def build_views(
    config: PretrainBoxConfig, settings: LoopSettings, num_classes: int, weights: Path | None = None
) -> TwoViews:
    """Return the module that the loop trains, on the CPU; see `build_pretext`."""
    return TwoViews(
        build_pretext(config, num_classes, weights), config.views, momentum=config.momentum, settings=settings
    )


def build_pretext(config: PretrainBoxConfig, num_classes: int, weights: Path | None = None) -> BoxPretext:
    """Return the detector with its backbone's weights (random without a file), projector and momentum copies."""
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.backbone)
    load_backbone_weights(backbone, weights)
    if not config.freeze_backbone and config.backbone.norm_eval == "auto":
        backbone.fix_norms()  # the authors' selfsup_*.py: BN in eval mode, scale and shift fixed
    detector = pretrain_detector(config).build(backbone, num_classes)
    detector.trains_objectness = config.objectness
    return BoxPretext(
        detector,
        recipe=config.detector.RECIPE,
        embedding_dim=config.projector.embedding_dim,
        projector=config.projector.resolve(config.detector.RECIPE.projector),
        temperature=config.temperature,
        tasks=config.tasks,
        freeze_backbone=config.freeze_backbone,
    )


def pretrain_detector(config: PretrainBoxConfig) -> DetectorConfig:
    """Return the detector to pre-train: without norm in the neck unless one is asked for (docs/paper.md §5.6)."""
    return settle_neck_norm(config.detector, "none")


def _finish(plan: Plan, pretext: BoxPretext) -> dict[str, Any]:
    """Write weights and pictures, and return the result."""
    config, folder = plan.config, plan.output.partial
    content = DetectorFile(
        stage="pretrain-box",
        detector=pretrain_detector(config),
        backbone=config.backbone,
        categories=(),
        resolution=None,
        state_dict=kept_state(pretext.online, "pretrain-box"),
        extra=_extra_parts(config, pretext),
        recipe=plan.recipe.name,
        backbone_training=plan.weights.training,
    )
    write_detector(folder / "weights.pt", content)
    merge_skipped(folder)
    _draw(plan)
    health = judge(folder / "metrics.jsonl")
    logger.info(f"{health['verdict']}: {health['explanation']}")
    return {
        "verdict": health.pop("verdict"),
        "steps": plan.settings.schedule.num_steps,
        "backbone_weights": weights_kind(plan.weights.training),
        "images": len(plan.indices),
        "boxes": _num_boxes(plan),
        "trained_parameters": sum(p.numel() for p in pretext.parameters() if p.requires_grad),
        **health,
    }


def _extra_parts(config: PretrainBoxConfig, pretext: BoxPretext) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts to save that are no part of the fine-tuned detector."""
    parts = {"projector": pretext.projector.state_dict()}
    if config.objectness:  # apart from the detector's weights, since fine-tuning restarts it
        parts[OBJECTNESS] = pretext.online.class_predictor.state_dict()
    return parts


def _draw(plan: Plan) -> None:
    config, folder = plan.config, plan.output.partial
    metrics, file = folder / "metrics.jsonl", folder / "plots" / "views.jpg"
    plot_curves(metrics, file.parent, rank_level(metrics))
    stream = SampleStream(plan.image_set, plan.indices, plan.boxes, "skip")
    with never_failing(file):
        batch_size = config.training.images_per_step
        draw_first_views(file, stream, config.views, seed=config.seed, batch_size=batch_size)


STEPS = Steps[PretrainBoxConfig, Plan](PretrainBoxConfig, prepare, describe, run, rebuild=rebuild)
