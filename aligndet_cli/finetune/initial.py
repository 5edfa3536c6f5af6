"""Where a fine-tuning run starts: which weights, and the detector and backbone settings that follow from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aligndet_cli.backbones import (
    RANDOM_WEIGHTS,
    BackboneConfig,
    BackboneWeights,
    WeightsTraining,
    find_backbone_weights,
    training_shown_by,
    weights_of,
)
from aligndet_cli.config import WORKSPACE_WEIGHTS
from aligndet_cli.detectors import DetectorConfig, neck_norm_of, settle_neck_norm, with_head_norm
from aligndet_cli.detectors.checkpoint import DetectorFile, read_detector
from aligndet_cli.detectors.faster_rcnn import RCNNConfig
from aligndet_cli.detectors.recipes import RCNN, LabelFacts, fit_to_labels, recipe_for, told_training
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.files import hash_files
from aligndet_cli.training.recipe import Freezing, Recipe
from aligndet_cli.workspace import Artifact, Workspace

if TYPE_CHECKING:
    from aligndet_cli.finetune.config import FinetuneConfig

LABELS = LabelFacts()  # all images of a set of its own classes


@dataclass(frozen=True)
class Initial:
    """The resolved start of a fine-tuning run.

    Attributes:
        kind: `pretrain`, `backbone`, `scratch`, or `file`.
        file: detector weights to transfer from; None for `backbone` and `scratch`.
        detector, backbone: settings, with nothing left "auto".
        content_hash: of the weights, for the manifest.
        origin: the weights, in words.
        freeze_origin: why the backbone is frozen the way it is.
        training, training_origin: how the backbone was trained (decides freezing and scales), and what tells so.
        recipe, recipe_origin: how it is trained, and why so.
        has_new_head_norms: the recipe has put norms into the heads.
        weights: of the backbone alone, where nothing else is loaded.
    """

    kind: Literal["pretrain", "backbone", "scratch", "file"]
    file: Path | None
    detector: DetectorConfig
    backbone: BackboneConfig
    content_hash: str
    origin: str
    training: WeightsTraining
    training_origin: str
    recipe: Recipe
    recipe_origin: str
    freeze_origin: str = ""
    has_new_head_norms: bool = False
    weights: BackboneWeights = RANDOM_WEIGHTS

    @property
    def is_pretrained(self) -> bool:
        """Whether neck and head come from somewhere, so that the fine-tuning recipe applies."""
        return self.file is not None


def find_initial(config: FinetuneConfig, workspace: Workspace, labels: LabelFacts = LABELS) -> Initial:
    """Resolve `--init`, and choose the recipe.

    Raises:
        ConfigError: no fitting pre-trained run, no such file, or no backbone weights.
        WeightsError: the file is not a detector of ours.
    """
    return _with_freezing(_find(config, workspace, labels))


def _find(config: FinetuneConfig, workspace: Workspace, labels: LabelFacts) -> Initial:
    if config.init == "scratch":
        if config.backbone.weights not in ("auto", "none"):
            raise ConfigError("--init scratch: loads nothing; leave out --backbone-weights, or use --init backbone")
        return _resolved(config, labels, "scratch", None, "none", "random, nothing loaded")
    if config.init == "backbone":
        return _backbone_only(config, workspace, labels)
    if config.init == "pretrain":
        run = _pretrained_run(config, workspace)
        return _resolved(
            config, labels, "pretrain", run.folder / "weights.pt", run.content_hash, f"pretrain-box/{run.name}"
        )
    file = Path(config.init)
    if not file.is_file():
        raise ConfigError(f"--init {config.init}: write pretrain, backbone, scratch or the path of a weights.pt")
    return _resolved(config, labels, "file", file, hash_files([file]), str(file))


def _backbone_only(config: FinetuneConfig, workspace: Workspace, labels: LabelFacts) -> Initial:
    """The backbone alone: what was asked for, else what the newest fitting run started from, as its control."""
    backbone, run = config.backbone, _newest_fitting(config, workspace)
    recorded = RANDOM_WEIGHTS.content_hash
    if backbone.weights == "auto" and run is not None:
        recorded = run.manifest["inputs"]["backbone weights"]
    if recorded != RANDOM_WEIGHTS.content_hash and run is not None:
        settings = run.config()["backbone"]
        backbone = backbone.model_copy(update={"name": settings["name"], "weights": settings["weights"]})
    if recorded != RANDOM_WEIGHTS.content_hash and backbone.weights in WORKSPACE_WEIGHTS:
        weights = _recorded_weights(recorded, workspace)
    else:
        weights = find_backbone_weights(backbone.weights, backbone.name, workspace, offline=config.runtime.offline)
    if weights.file is None:
        raise ConfigError("--init backbone: no backbone weights; give --backbone-weights, or use --init scratch")
    changed = config.model_copy(update={"backbone": backbone})
    origin = f"backbone only, {weights.origin}"
    return _resolved(changed, labels, "backbone", None, weights.content_hash, origin, weights)


def _recorded_weights(content_hash: str, workspace: Workspace) -> BackboneWeights:
    for artifact in workspace.artifacts("pretrain-image"):
        if artifact.content_hash == content_hash:
            return weights_of(artifact)
    raise ConfigError(
        "--init backbone: the backbone that pretrain-box started from is no longer in the workspace; "
        "give --backbone-weights, or run pretrain-box again"
    )


def _pretrained_run(config: FinetuneConfig, workspace: Workspace) -> Artifact:
    run = _newest_fitting(config, workspace)
    if run is not None:
        return run
    wanted = config.detector.family + (f" on {config.backbone.name}" if _is_backbone_chosen(config) else "")
    there = ", ".join(artifact.name for artifact in workspace.artifacts("pretrain-box"))
    raise ConfigError(
        f"{workspace.root / 'pretrain-box'}: no finished run of {wanted}{f' (there: {there})' if there else ''}; "
        f"run `aligndet pretrain-box --detector {config.detector.family}` first, or use --init backbone or scratch"
    )


def _newest_fitting(config: FinetuneConfig, workspace: Workspace) -> Artifact | None:
    """Return the newest pre-trained run of the family, and of the same backbone if one was named.

    Without one, Faster and Mask R-CNN take a run of each other: the authors' Faster R-CNN starts from their Mask R-CNN.
    """
    for families in ({config.detector.family}, _interchangeable(config.detector.family)):
        for run in reversed(workspace.artifacts("pretrain-box")):
            settings = run.config()
            is_same_backbone = settings["backbone"]["name"] == config.backbone.name or not _is_backbone_chosen(config)
            if settings["detector"]["family"] in families and is_same_backbone:
                return run
    return None


def _interchangeable(family: str) -> set[str]:
    """Return the families whose pre-training is the same: that of Faster and Mask R-CNN leaves the mask head alone."""
    return set(RCNN) if family in RCNN else {family}


def _is_backbone_chosen(config: FinetuneConfig) -> bool:
    return "name" in config.backbone.model_fields_set


def _resolved(
    config: FinetuneConfig,
    labels: LabelFacts,
    kind: Literal["pretrain", "backbone", "scratch", "file"],
    file: Path | None,
    content_hash: str,
    origin: str,
    weights: BackboneWeights = RANDOM_WEIGHTS,
) -> Initial:
    detector, backbone, asked = config.detector, config.backbone, config.recipe
    recipe_origin = "given" if asked else "by detector, backbone and its weights"
    is_made_for_recipe = True
    training: WeightsTraining | None = weights.training
    if file is not None:
        source = read_detector(file)
        detector, backbone = _inherited(config, source, file)
        is_made_for_recipe = source.stage == "pretrain-box"
        training = source.backbone_training or _training_before_it_was_recorded(source.backbone)
        if asked is None and source.recipe is not None:
            asked, recipe_origin = source.recipe, f"that of {origin}"
    training, training_origin = _judge(training, backbone)
    recipe = fit_to_labels(recipe_for(detector, backbone, training, asked=asked), detector.family, labels)
    # AlignDet's fine-tuning configs: batch norm in the neck. Norms that were asked for or inherited stay.
    inherited = settle_neck_norm(detector, "batch")
    detector = inherited
    if recipe.norms_in_heads and is_made_for_recipe and "head_norm" not in config.detector.model_fields_set:
        detector = with_head_norm(inherited, "batch")
    return Initial(
        kind=kind,
        file=file,
        detector=detector,
        backbone=backbone,
        content_hash=content_hash,
        origin=origin,
        training=training,
        training_origin=training_origin,
        recipe=recipe,
        recipe_origin=recipe_origin,
        has_new_head_norms=detector != inherited,
        weights=weights,
    )


def _judge(training: WeightsTraining | None, backbone: BackboneConfig) -> tuple[WeightsTraining, str]:
    """Return how the backbone counts as trained, and why.

    Args:
        training: what is known; None where nothing is.
    """
    told = told_training(backbone.method)
    if told is not None:
        return told, f"backbone.method is {backbone.method}"
    if training is None:
        return WeightsTraining(), "how they were trained was not recorded; --set backbone.method=supervised says it"
    return training, training.reason


def _training_before_it_was_recorded(backbone: BackboneConfig) -> WeightsTraining | None:
    """Return how a backbone was trained whose detector was saved by a version that kept only what the user typed.

    Returns:
        what its file shows, if it is still there; None if nothing tells.
    """
    if backbone.weights in WORKSPACE_WEIGHTS:
        return None
    try:
        return training_shown_by(backbone.weights, backbone.name)
    except WeightsError:
        return None


def _with_freezing(initial: Initial) -> Initial:
    """Return the start with nothing left "auto" in what its backbone leaves alone.

    Source: the authors' configs: supervised ResNets keep stem and first stage, and the statistics of their norms
    (coco/*_1x_coco.py); self-supervised ones train as a whole (coco/*_mstrain_1x_coco.py).
    """
    recipe = initial.recipe
    if initial.kind == "scratch":
        freezing, why = Freezing(-1, norm_eval=False), "nothing is loaded that could be kept"
    elif recipe.freezing is not None:
        freezing = recipe.freezing
        why = f"{initial.detector.family} recipe" if recipe.name == "default" else f"{recipe.name} recipe"
        why += f" for a {initial.backbone.name}, whatever its weights"
    else:
        word = "supervised" if initial.training.is_supervised else "not supervised"
        freezing = Freezing(1, norm_eval=True) if initial.training.is_supervised else Freezing(-1, norm_eval=False)
        why = f"{word} weights: {initial.training_origin}"
    backbone = initial.backbone
    changes = {name: value for name, value in asdict(freezing).items() if getattr(backbone, name) == "auto"}
    why = why if changes else "given"
    return replace(initial, backbone=backbone.model_copy(update=changes), freeze_origin=why)


def _inherited(config: FinetuneConfig, source: DetectorFile, file: Path) -> tuple[DetectorConfig, BackboneConfig]:
    """Settings of the source, with those the user set on top: no need to repeat what pre-training was told."""
    family = config.detector.family
    if source.detector.family not in (_interchangeable(family) if source.stage == "pretrain-box" else {family}):
        raise ConfigError(f"{file}: is a {source.detector.family}, not a {config.detector.family}; change --detector")
    if _is_backbone_chosen(config) and source.backbone.name != config.backbone.name:
        raise ConfigError(f"{file}: has a {source.backbone.name}, not a {config.backbone.name}; change --backbone")
    changes = {key: getattr(config.detector, key) for key in config.detector.model_fields_set}
    if source.stage == "pretrain-box" and neck_norm_of(source.detector) == "none":
        changes.setdefault("neck_norm", "auto")
    kept = {key: getattr(config.backbone, key) for key in config.backbone.model_fields_set - {"weights"}}
    return _as_family(source.detector, config.detector).model_copy(update=changes), source.backbone.model_copy(
        update=kept
    )


def _as_family(detector: DetectorConfig, wanted: DetectorConfig) -> DetectorConfig:
    """Return the settings of a detector for another family of the same pre-training."""
    if detector.family == wanted.family:
        return detector
    shared = {name: value for name, value in detector.model_dump().items() if name in RCNNConfig.model_fields}
    return type(wanted).model_validate(shared)
