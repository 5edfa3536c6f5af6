"""Start of a fine-tuning run: its weights, and the detector and backbone settings that follow from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from aligndet_cli.backbones import (
    RANDOM_WEIGHTS,
    BackboneConfig,
    BackboneWeights,
    WeightsTraining,
    load_backbone_weights,
)
from aligndet_cli.backbones.build import WEIGHTS_FILE
from aligndet_cli.backbones.weights import find_backbone_weights, training_shown_by, weights_of
from aligndet_cli.config import WORKSPACE_WEIGHTS
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors import Detector, DetectorConfig, neck_norm_of, settle_neck_norm, with_head_norm
from aligndet_cli.detectors.checkpoint import DetectorFile, read_detector
from aligndet_cli.detectors.recipes import ALIKE, LabelFacts, fit_to_labels, recipe_for, told_training
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.files import hash_files, read_json
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.finetune.transfer import LoadReport, modules_to_restart, parse_modules, transfer
from aligndet_cli.finetune.views import Resolution, resolve_resolution
from aligndet_cli.training.recipe import MULTI_SCALE, SINGLE_SCALE, Freezing, Rates, Recipe
from aligndet_cli.workspace import Artifact, Workspace

LABELS = LabelFacts()  # all images of a data set with its own classes


@dataclass(frozen=True)
class Initial:
    """Resolved start of a fine-tuning run.

    Attributes:
        file: detector weights to transfer from; None for `backbone` and `scratch`.
        detector, backbone: settings, with nothing left "auto".
        content_hash: hash of the weights, for the manifest.
        origin: the weights, in words.
        training: of the backbone, which decides freezing and scales.
        recipe, recipe_origin: recipe of the run, and the reason for it.
        freeze_origin: reason for the freezing of the backbone.
        weights: weights of the backbone if no detector is loaded.
    """

    kind: Literal["pretrain", "backbone", "scratch", "file"]
    file: Path | None
    detector: DetectorConfig
    backbone: BackboneConfig
    content_hash: str
    origin: str
    training: WeightsTraining
    recipe: Recipe
    recipe_origin: str
    freeze_origin: str
    weights: BackboneWeights = RANDOM_WEIGHTS

    @property
    def rates(self) -> Rates:
        """Rates for fine-tuning after pre-training if neck and head are loaded, else for plain fine-tuning."""
        return self.recipe.plain if self.file is None else self.recipe.finetune


def find_initial(config: FinetuneConfig, workspace: Workspace, labels: LabelFacts = LABELS) -> Initial:
    """Resolve `--init` and choose the recipe.

    Raises:
        ConfigError: no fitting pre-trained run, no such file, or no backbone weights.
        WeightsError: the file is not a detector of ours, or the weights of a pre-trained run have changed.
    """
    if config.init == "scratch":
        if config.backbone.weights not in ("auto", "none"):
            raise ConfigError("--init scratch: loads nothing; leave out --backbone-weights, or use --init backbone")
        return _resolved(config, labels, "scratch", None, "none", "random, nothing loaded")
    if config.init == "backbone":
        return _backbone_only(config, workspace, labels)
    if config.init == "pretrain":
        run = _pretrained_run(config, workspace)
        file, origin = run.folder / "weights.pt", f"pretrain-box/{run.name}"
        return _resolved(config, labels, "pretrain", file, run.content_hash, origin)
    file = Path(config.init)
    if not file.is_file():
        raise ConfigError(f"--init {config.init}: write pretrain, backbone, scratch or the path of a weights.pt")
    return _resolved(config, labels, "file", file, hash_files([file]), str(file))


def load_initial(
    model: Detector, initial: Initial, config: FinetuneConfig, categories: Sequence[Category]
) -> LoadReport | None:
    """Fill a detector for these classes with its initial weights.

    Returns:
        The report, or None if only a backbone is loaded.

    Raises:
        WeightsError: too little of the source fits.
    """
    if initial.file is None:
        load_backbone_weights(model.backbone, initial.weights.file)
        return None
    source = read_detector(initial.file)
    restart = modules_to_restart(model, source, categories, keep_box_predictor=config.keep_box_predictor)
    report = transfer(model, source.state_dict, modules=parse_modules(config.load_modules), restart=restart)
    report.check(config.min_match, str(initial.file))
    return report


def resolution_of(initial: Initial, config: FinetuneConfig) -> Resolution:
    """Return the resolution asked for, by default the recipe's for these backbone weights."""
    scales = initial.recipe.short_sides or (SINGLE_SCALE if initial.training.is_supervised else MULTI_SCALE)
    return resolve_resolution(config.resolution, initial.recipe.policy, scales)


def _backbone_only(config: FinetuneConfig, workspace: Workspace, labels: LabelFacts) -> Initial:
    """Return a start from a backbone alone, by default from the backbone of the newest fitting pre-training run."""
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
        weights = find_backbone_weights(backbone, workspace, offline=config.runtime.offline)
        if recorded not in (RANDOM_WEIGHTS.content_hash, weights.content_hash) and run is not None:
            raise WeightsError(
                f"--init backbone: {weights.file} is not the file that pretrain-box/{run.name} started from; put that "
                "one there again, or give --backbone-weights FILE"
            )
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

    If there is none, Faster and Mask R-CNN take each other's, as the authors' Faster R-CNN does; so do the cascades.
    """
    for families in ({config.detector.family}, _interchangeable(config.detector.family)):
        for run in reversed(workspace.artifacts("pretrain-box")):
            settings = run.config()
            is_same_backbone = settings["backbone"]["name"] == config.backbone.name or not _is_backbone_chosen(config)
            if settings["detector"]["family"] in families and is_same_backbone:
                return run
    return None


def _interchangeable(family: str) -> set[str]:
    """Return the families with the same pre-training."""
    return next((set(families) for families in ALIKE if family in families), {family})


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
    training: WeightsTraining | None = weights.training
    source = None
    if file is not None:
        source = read_detector(file)
        detector, backbone = _inherited(config, source, file)
        training = source.backbone_training or _training_before_it_was_recorded(source.backbone, file)
        if asked is None and source.recipe is not None:
            asked, recipe_origin = source.recipe, f"that of {origin}"
    training, training_origin = _judge(training, backbone)
    recipe = fit_to_labels(recipe_for(detector, backbone, training, asked=asked), detector.family, labels)
    detector = _with_norms(config, detector, recipe, source)
    backbone, freeze_origin = _with_freezing(kind, detector, backbone, recipe, (training, training_origin))
    return Initial(
        kind=kind,
        file=file,
        detector=detector,
        backbone=backbone,
        content_hash=content_hash,
        origin=origin,
        training=training,
        recipe=recipe,
        recipe_origin=recipe_origin,
        freeze_origin=freeze_origin,
        weights=weights,
    )


def _with_norms(
    config: FinetuneConfig, detector: DetectorConfig, recipe: Recipe, source: DetectorFile | None
) -> DetectorConfig:
    """Return the detector with no norm left "auto", and with the norms in its heads that the recipe adds.

    Source: AlignDet's fine-tuning configs, with batch norm in the neck but for CBNet. Norms that were asked for or
    inherited stay.
    """
    settled = settle_neck_norm(detector, recipe.neck_norm)
    has_own_heads = source is not None and source.stage != "pretrain-box"
    if not recipe.norms_in_heads or has_own_heads or "head_norm" in config.detector.model_fields_set:
        return settled
    return with_head_norm(settled, "batch")


def _judge(training: WeightsTraining | None, backbone: BackboneConfig) -> tuple[WeightsTraining, str]:
    """Return the training that the backbone counts as, and its source; `training` is on record, None if unknown."""
    told = told_training(backbone.method)
    if told is not None:
        return told, f"backbone.method is {backbone.method}"
    if training is None:
        return WeightsTraining(), "how they were trained was not recorded; --set backbone.method=supervised says it"
    return training, training.reason


def _training_before_it_was_recorded(backbone: BackboneConfig, detector: Path) -> WeightsTraining | None:
    """Return the training shown by the weights that an old run names; None if they are gone, changed, or show nothing.

    Args:
        detector: `weights.pt` of that run, beside which the manifest has the hash of a file.
    """
    if backbone.weights in WORKSPACE_WEIGHTS:
        return None
    try:
        if WEIGHTS_FILE.is_file(backbone.weights) and (manifest := detector.with_name("manifest.json")).exists():
            file = Path(backbone.weights)
            if not file.is_file() or hash_files([file]) != read_json(manifest)["inputs"].get("backbone weights"):
                return None
        return training_shown_by(backbone.weights, backbone.name)
    except WeightsError:
        return None


def _with_freezing(
    kind: str, detector: DetectorConfig, backbone: BackboneConfig, recipe: Recipe, trained: tuple[WeightsTraining, str]
) -> tuple[BackboneConfig, str]:
    """Return the backbone with no freezing left "auto", and the reason for it; `trained` is the result of `_judge`.

    Source: the authors' configs. Supervised ResNets freeze stem, first stage and norm statistics
    (coco/*_1x_coco.py); self-supervised ones train as a whole (coco/*_mstrain_1x_coco.py).
    """
    training, training_origin = trained
    if kind == "scratch":
        freezing, why = Freezing(-1, norm_eval=False), "nothing is loaded that could be kept"
    elif recipe.freezing is not None:
        freezing = recipe.freezing
        why = f"{detector.family} recipe" if recipe.name == "default" else f"{recipe.name} recipe"
        why += f" for a {backbone.name}, whatever its weights"
    elif training.is_supervised:
        freezing, why = Freezing(1, norm_eval=True), f"supervised weights: {training_origin}"
    else:
        freezing, why = Freezing(-1, norm_eval=False), f"not supervised weights: {training_origin}"
    changes = {name: value for name, value in asdict(freezing).items() if getattr(backbone, name) == "auto"}
    return backbone.model_copy(update=changes), why if changes else "given"


def _inherited(config: FinetuneConfig, source: DetectorFile, file: Path) -> tuple[DetectorConfig, BackboneConfig]:
    """Return the settings of the source, updated with all settings of the user, who need not repeat the others."""
    family = config.detector.family
    if source.detector.family not in (_interchangeable(family) if source.stage == "pretrain-box" else {family}):
        raise ConfigError(f"{file}: is a {source.detector.family}, not a {config.detector.family}; change --detector")
    if _is_backbone_chosen(config) and source.backbone.name != config.backbone.name:
        raise ConfigError(f"{file}: has a {source.backbone.name}, not a {config.backbone.name}; change --backbone")
    changes = {key: getattr(config.detector, key) for key in config.detector.model_fields_set}
    if source.stage == "pretrain-box" and neck_norm_of(source.detector) == "none":
        changes.setdefault("neck_norm", "auto")
    kept = {key: getattr(config.backbone, key) for key in config.backbone.model_fields_set - {"weights"}}
    detector = _as_family(source.detector, config.detector).model_copy(update=changes)
    return detector, source.backbone.model_copy(update=kept)


def _as_family(detector: DetectorConfig, wanted: DetectorConfig) -> DetectorConfig:
    """Return the settings of a detector for another family with the same pre-training."""
    if detector.family == wanted.family:
        return detector
    fields = type(wanted).model_fields.keys() - {"family"}
    settings = detector.model_dump(exclude_defaults=True)  # families have defaults of their own
    return type(wanted).model_validate({name: value for name, value in settings.items() if name in fields})
