"""Where a fine-tuning run starts: which weights, and the detector and backbone settings that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aligndet_cli.backbones import (
    RANDOM_WEIGHTS,
    BackboneConfig,
    BackboneWeights,
    find_backbone_weights,
    weights_of,
)
from aligndet_cli.config import WORKSPACE_WEIGHTS
from aligndet_cli.detectors import DetectorConfig, neck_norm_of, settle_neck_norm, with_head_norm
from aligndet_cli.detectors.checkpoint import DetectorFile, read_detector
from aligndet_cli.detectors.recipes import recipe_for
from aligndet_cli.errors import ConfigError
from aligndet_cli.training.schedules import Recipe
from aligndet_cli.workspace import Artifact, Workspace, hash_files

if TYPE_CHECKING:
    from aligndet_cli.finetune.stage import FinetuneConfig


@dataclass(frozen=True)
class Initial:
    """The resolved start of a fine-tuning run.

    Attributes:
        kind: `pretrain`, `backbone`, `scratch`, or `file`.
        file: detector weights to transfer from; None for `backbone` and `scratch`.
        detector, backbone: settings with nothing left "auto".
        content_hash: of the weights, for the manifest.
        origin: the weights, in words.
        freeze_origin: why the backbone is frozen the way it is.
        is_supervised_backbone: whether the backbone was trained on ImageNet's labels (decides freezing and scales).
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
    freeze_origin: str
    is_supervised_backbone: bool
    recipe: Recipe
    recipe_origin: str
    has_new_head_norms: bool = False
    weights: BackboneWeights = RANDOM_WEIGHTS

    @property
    def is_pretrained(self) -> bool:
        """Whether neck and head come from somewhere, so that the fine-tuning recipe applies."""
        return self.file is not None


def find_initial(config: FinetuneConfig, workspace: Workspace) -> Initial:
    """Resolve `--init`.

    Raises:
        ConfigError: no fitting pre-trained run, no such file, or no backbone weights.
        WeightsError: the file is not a detector of ours.
    """
    if config.init == "scratch":
        if config.backbone.weights not in ("auto", "none"):
            raise ConfigError("--init scratch: loads nothing; leave out --backbone-weights, or use --init backbone")
        return _resolved(config, "scratch", None, "none", "random, nothing loaded")
    if config.init == "backbone":
        return _backbone_only(config, workspace)
    if config.init == "pretrain":
        run = _pretrained_run(config, workspace)
        return _resolved(config, "pretrain", run.folder / "weights.pt", run.content_hash, f"pretrain-box/{run.name}")
    file = Path(config.init)
    if not file.is_file():
        raise ConfigError(f"--init {config.init}: write pretrain, backbone, scratch or the path of a weights.pt")
    return _resolved(config, "file", file, hash_files([file]), str(file))


def _backbone_only(config: FinetuneConfig, workspace: Workspace) -> Initial:
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
    initial = _resolved(changed, "backbone", None, weights.content_hash, origin, weights.layout)
    return replace(initial, weights=weights)


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
    """Newest pre-trained run of the same family, and of the same backbone if one was named."""
    for run in reversed(workspace.artifacts("pretrain-box")):
        settings = run.config()
        is_same_backbone = settings["backbone"]["name"] == config.backbone.name or not _is_backbone_chosen(config)
        if settings["detector"]["family"] == config.detector.family and is_same_backbone:
            return run
    return None


def _is_backbone_chosen(config: FinetuneConfig) -> bool:
    return "name" in config.backbone.model_fields_set


def _resolved(
    config: FinetuneConfig,
    kind: Literal["pretrain", "backbone", "scratch", "file"],
    file: Path | None,
    content_hash: str,
    origin: str,
    layout: str | None = None,
) -> Initial:
    detector, backbone, asked = config.detector, config.backbone, config.recipe
    recipe_origin = "given" if asked else "by detector, backbone and its weights"
    is_made_for_recipe = True
    if file is not None:
        source = read_detector(file)
        detector, backbone = _inherited(config, source, file)
        is_made_for_recipe = source.stage == "pretrain-box"
        if asked is None and source.recipe is not None:
            asked, recipe_origin = source.recipe, f"that of {origin}"
    recipe = recipe_for(detector, backbone, layout, asked=asked)
    # FACTS 5: batch norm in the neck. Asked-for or inherited norms other than the pre-training's "none" stay.
    inherited = settle_neck_norm(detector, "batch")
    detector = inherited
    if recipe.norms_in_heads and is_made_for_recipe and "head_norm" not in config.detector.model_fields_set:
        detector = with_head_norm(inherited, "batch")
    is_supervised = _is_torchvision_name(backbone.weights)
    frozen_stages, norm_eval, why = (1, True, "supervised") if is_supervised else (-1, False, "not supervised")
    if recipe.trains_whole_backbone:
        whose = detector.family if recipe.name == "default" else recipe.name
        frozen_stages, norm_eval, why = -1, False, f"{whose} recipe, for any"
    backbone = backbone.model_copy(
        update={
            "frozen_stages": frozen_stages if backbone.frozen_stages == "auto" else backbone.frozen_stages,
            "norm_eval": norm_eval if backbone.norm_eval == "auto" else backbone.norm_eval,
        }
    )
    return Initial(
        kind=kind,
        file=file,
        detector=detector,
        backbone=backbone,
        content_hash=content_hash,
        origin=origin,
        freeze_origin=f"{why} weights",
        is_supervised_backbone=is_supervised,
        recipe=recipe,
        recipe_origin=recipe_origin,
        has_new_head_norms=detector != inherited,
    )


def _inherited(config: FinetuneConfig, source: DetectorFile, file: Path) -> tuple[DetectorConfig, BackboneConfig]:
    """Settings of the source, with those the user set on top: no need to repeat what pre-training was told."""
    if source.detector.family != config.detector.family:
        raise ConfigError(f"{file}: is a {source.detector.family}, not a {config.detector.family}; change --detector")
    if _is_backbone_chosen(config) and source.backbone.name != config.backbone.name:
        raise ConfigError(f"{file}: has a {source.backbone.name}, not a {config.backbone.name}; change --backbone")
    changes = {key: getattr(config.detector, key) for key in config.detector.model_fields_set}
    if source.stage == "pretrain-box" and neck_norm_of(source.detector) == "none":
        changes.setdefault("neck_norm", "auto")
    kept = {key: getattr(config.backbone, key) for key in config.backbone.model_fields_set - {"weights"}}
    return source.detector.model_copy(update=changes), source.backbone.model_copy(update=kept)


def _is_torchvision_name(weights: str) -> bool:
    return weights != "none" and "IMAGENET" in weights.upper() or weights == "DEFAULT"
