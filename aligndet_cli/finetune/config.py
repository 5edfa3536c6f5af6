"""Settings of fine-tuning."""

from typing import Any, ClassVar

from pydantic import Field

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.config import StageConfig
from aligndet_cli.data.folds import MAX_FOLD
from aligndet_cli.data.loaders import OnError
from aligndet_cli.detectors import DetectorConfig, neck_norm_of
from aligndet_cli.detectors.recipes import recipe_for, training_of_backbone
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.finetune.views import ResolutionConfig
from aligndet_cli.training.settings import AskedRecipe, TrainingConfig, training_of


class FinetuneConfig(StageConfig):
    """Settings of `finetune`; defaults are the paper's, by recipe."""

    UNHASHED: ClassVar[frozenset[str]] = StageConfig.UNHASHED | {"init", "label"}

    detector: DetectorConfig = RetinaNetConfig()
    backbone: BackboneConfig = BackboneConfig()
    # pretrain: the newest fitting run; backbone: plain fine-tuning, the control; scratch; or a weights.pt.
    init: str = "pretrain"
    label: str | None = None  # what reports call this start; None: by what was loaded
    load_modules: tuple[str, ...] = ("backbone", "neck", "rpn", "head")
    keep_box_predictor: bool = True  # the official converter drops it
    min_match: float = Field(0.9, ge=0, le=1)
    fraction: float = Field(100.0, gt=0, le=100)  # percent of the training images
    fold: int = Field(1, ge=0, le=MAX_FOLD)
    resolution: ResolutionConfig = ResolutionConfig()
    on_error: OnError = "skip"
    evaluate_every: int | None = Field(None, ge=1)  # epochs
    recipe: AskedRecipe = None
    training: TrainingConfig = TrainingConfig()

    def from_recipe(self) -> dict[str, Any]:
        """Return the values that the recipe fills in, as far as they are known without data and workspace."""
        recipe = recipe_for(self.detector, self.backbone, training_of_backbone(self.backbone), asked=self.recipe)
        norms = {"detector.neck_norm": "batch"} if neck_norm_of(self.detector) == "auto" else {}
        if recipe.norms_in_heads and "head_norm" not in self.detector.model_fields_set:
            norms["detector.head_norm"] = "batch"
        rates = recipe.plain if self.init in ("backbone", "scratch") else recipe.finetune
        policy = {"resolution.policy": self.resolution.policy or recipe.policy}
        return {"recipe": recipe.name, **policy, **norms, **training_of(self.training, rates)}
