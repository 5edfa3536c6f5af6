"""Settings of `pretrain-box`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from aligndet_cli.backbones import BackboneConfig, WeightsTraining
from aligndet_cli.backbones.build import WEIGHTS_FILE
from aligndet_cli.config import Frozen, StageConfig
from aligndet_cli.data.loaders import OnError
from aligndet_cli.detectors import DetectorConfig, neck_norm_of, with_head_norm
from aligndet_cli.detectors.parts.fpn import NormName
from aligndet_cli.detectors.recipes import CASCADES, RCNN, is_resnet, recipe_for, training_of_backbone
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.pretrain_box.pretext import Tasks
from aligndet_cli.pretrain_box.recipes import (
    DEFAULTS,
    HEAD_NORMS,
    METHODS,
    NECK_NORMS,
    RECIPES_AFTER,
    MethodName,
    recipe_of_method,
)
from aligndet_cli.pretrain_box.views import ViewsConfig
from aligndet_cli.training.recipe import ProjectorRecipe, ProjectorStart, Recipe, RecipeName
from aligndet_cli.training.settings import AskedRecipe, TrainingConfig, training_of


class ProjectorConfig(Frozen):
    """The MLP behind the classification features."""

    hidden_dim: int | None = Field(None, ge=1, description="Width of the projector's hidden layer (by recipe).")
    embedding_dim: int = Field(256, ge=1, description="Dimensions of an embedding.")  # the authors' selfsup_*.py
    # see `ProjectorRecipe`
    start: ProjectorStart | None = Field(None, description="Initial weights of the projector (by recipe).")

    def resolve(self, recipe: ProjectorRecipe) -> ProjectorRecipe:
        """Return the recipe with the values that are set here."""
        return ProjectorRecipe(self.hidden_dim or recipe.hidden_dim, self.start or recipe.start)


def _with_default_norm(detector: Any, norm: NormName) -> Any:
    """Return an R-CNN's settings or config with this norm in the head unless one is set; others as they are."""
    if isinstance(detector, Mapping):
        return {"head_norm": norm, **detector} if detector.get("family") in RCNN else detector
    is_open = isinstance(detector, Frozen) and "head_norm" not in detector.model_fields_set
    return with_head_norm(detector, norm) if is_open and getattr(detector, "family", None) in RCNN else detector


class PretrainBoxConfig(StageConfig):
    """Settings of `pretrain-box`; defaults are the paper's."""

    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {"proposals", "clusters", "embedder"}
    BEFORE: ClassVar[dict[str, Any]] = {"projector.start": "kaiming"}

    method: MethodName = Field("aligndet", description="Task to pre-train with.")
    detector: DetectorConfig = RetinaNetConfig()
    backbone: BackboneConfig = BackboneConfig()
    # DETReg: of a backbone of the same name.
    embedder: Annotated[str | None, WEIGHTS_FILE] = Field(
        None, description="Weights of DETReg's second backbone: torchvision name, timm or file (those of the first)."
    )
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

    @model_validator(mode="before")
    @classmethod
    def _take_defaults_of_method(cls, settings: Any) -> Any:
        """Fill in what the method sets and the user does not, so that a saved config says what was used."""
        method = settings.get("method") if isinstance(settings, Mapping) else None
        if method not in METHODS:
            return settings
        filled = {**DEFAULTS[method], **settings}
        if isinstance(filled.get("views"), Mapping):
            filled["views"] = {**DEFAULTS[method].get("views", {}), **filled["views"]}
        if "detector" in filled and method in HEAD_NORMS:
            filled["detector"] = _with_default_norm(filled["detector"], HEAD_NORMS[method])
        return filled

    @property
    def needs_clusters(self) -> bool:
        """The classes to train on are clusters."""
        if self.method == "aligndet":
            return self.detector.RECIPE.needs_clusters
        return self.method == "classes"

    @property
    def finds_objects(self) -> bool:
        """The run learns boxes, and a score to find them with, as a second round of proposals needs them."""
        # With clusters, Faster and Mask R-CNN have boxes for each, which are not kept; cascades have one for all.
        families = {"aligndet": RCNN, "classes": CASCADES}.get(self.method, ())
        return self.tasks != "contrastive" and (self.detector.family in families or self.objectness)

    @property
    def neck_norm(self) -> Literal["batch", "none"]:
        """Norm of the neck in pre-training, unless one is asked for."""
        return NECK_NORMS.get(self.method, "none")

    def full_recipe(self, training: WeightsTraining) -> Recipe:
        """Return the recipe of detector, backbone and method, for a backbone that was trained like this."""
        recipe = recipe_of_method(recipe_for(self.detector, self.backbone, training, asked=self.recipe), self.method)
        if self.freeze_backbone:  # which has no layers to train, then
            return replace(recipe, pretrain=replace(recipe.pretrain, layer_decay=1.0))
        return recipe

    def recipe_afterwards(self, recipe: Recipe) -> RecipeName:
        """Return the name of the recipe that fine-tuning goes on with, unless it is given another.

        It is the method's own, on the ResNets that it is for; else `recipe`, that of the pre-training.
        """
        is_by_method = self.recipe is None and is_resnet(self.backbone)
        return RECIPES_AFTER.get(self.method, recipe.name) if is_by_method else recipe.name

    def from_recipe(self) -> dict[str, Any]:
        """Return the values that the recipe fills in, as far as they are known without a workspace."""
        recipe = self.full_recipe(training_of_backbone(self.backbone))
        norm = {"detector.neck_norm": self.neck_norm} if neck_norm_of(self.detector) == "auto" else {}
        topk = {"topk": recipe.topk} if self.topk is None else {}
        projector = self.projector.resolve(recipe.projector)
        mlp = {"projector.hidden_dim": projector.hidden_dim, "projector.start": projector.start}
        return {"recipe": recipe.name, **norm, **topk, **mlp, **training_of(self.training, recipe.pretrain)}
