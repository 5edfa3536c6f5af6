"""Settings of fine-tuning."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.config import FileOr, StageConfig
from aligndet_cli.data.folds import MAX_FOLD
from aligndet_cli.data.loaders import OnError
from aligndet_cli.detectors import DetectorConfig, neck_norm_of
from aligndet_cli.detectors.recipes import recipe_for, training_of_backbone
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.finetune.views import ResolutionConfig
from aligndet_cli.training.settings import AskedRecipe, TrainingConfig, training_of


class FinetuneConfig(StageConfig):
    """Settings of `finetune`; defaults are the paper's, by recipe."""

    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {"init", "label", "pixel_maps"}

    detector: DetectorConfig = RetinaNetConfig()
    backbone: BackboneConfig = BackboneConfig()
    # backbone is plain fine-tuning, the control
    init: Annotated[str, FileOr(("pretrain", "backbone", "scratch"))] = Field(
        "pretrain", description="Start: pretrain (newest fitting run), backbone, scratch, a weights.pt."
    )
    label: str | None = Field(None, description="Name of the start in reports (by what was loaded).")
    load_modules: tuple[str, ...] = Field(("backbone", "neck", "rpn", "head"), description="Pre-trained parts to load.")
    # the official converter drops it
    keep_box_predictor: bool = Field(True, description="Load the last layer of the box branch, too.")
    min_match: float = Field(0.9, ge=0, le=1, description="Least share of the weights that must fit, 0 to 1.")
    fraction: float = Field(100.0, gt=0, le=100, description="Percent of the labelled images to train on.")
    fold: int = Field(1, ge=0, le=MAX_FOLD, description="Fold of the fraction: which of the images it holds.")
    pixel_maps: Path | None = Field(
        None, description="Folder of PNGs with the class of every pixel, for detector.semantic_classes (none)."
    )
    resolution: ResolutionConfig = ResolutionConfig()
    on_error: OnError = Field("skip", description="Reaction to an image that cannot be read.")
    evaluate_every: int | None = Field(None, ge=1, description="Epochs between evaluations while training (none).")
    early_stop: int | None = Field(None, ge=1, description="Evaluations without a better number before the end (none).")
    # the paper averages no weights in fine-tuning
    ema: float | None = Field(None, gt=0, lt=1, description="Decay of a moving average of the weights, 0 to 1 (none).")
    recipe: AskedRecipe = Field(None, description="Recipe to train with (by detector, backbone and weights).")
    training: TrainingConfig = TrainingConfig()

    def from_recipe(self) -> dict[str, Any]:
        """Return the values that the recipe fills in, as far as they are known without data and workspace."""
        recipe = recipe_for(self.detector, self.backbone, training_of_backbone(self.backbone), asked=self.recipe)
        norms = {"detector.neck_norm": recipe.neck_norm} if neck_norm_of(self.detector) == "auto" else {}
        if recipe.norms_in_heads and "head_norm" not in self.detector.model_fields_set:
            norms["detector.head_norm"] = "batch"
        rates = recipe.plain if self.init in ("backbone", "scratch") else recipe.finetune
        policy = {"resolution.policy": self.resolution.policy or recipe.policy}
        return {"recipe": recipe.name, **policy, **norms, **training_of(self.training, rates)}
