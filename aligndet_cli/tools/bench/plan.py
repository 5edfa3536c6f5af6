"""Make settings, module and batches of a stage that `aligndet bench` times, without a workspace."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from aligndet_cli.backbones import BackboneConfig, WeightsTraining
from aligndet_cli.config import Side, StageConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.loaders import BoxSource, LabelBoxes, SampleStream, batches_of_run
from aligndet_cli.data.masks import LabelMasks
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.sides import Sides
from aligndet_cli.detectors import DetectorConfig, semantic_classes_of, settle_neck_norm
from aligndet_cli.detectors.recipes import recipe_for
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.finetune.views import LabelledViews, ResolutionConfig, build_views, resolve_resolution
from aligndet_cli.pretrain_box import stage as pretrain_box
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.methods.aligndet import TwoViews
from aligndet_cli.pretrain_box.views import ViewsConfig
from aligndet_cli.processes.devices import Process
from aligndet_cli.tools.bench.images import DrawnPixelClasses, DrawnProposals
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import MULTI_SCALE, REFERENCE_BATCH, Rates, Recipe
from aligndet_cli.training.settings import TrainingConfig, resolve_settings

StageName = Literal["pretrain-box", "finetune"]
NUM_CLUSTERS = 256  # the default of `cluster`


class BenchConfig(StageConfig):
    """Settings of `bench`. Resolutions, views and workers that are not set are those of the stages."""

    stage: Literal["pretrain-box", "finetune", "both"] = Field("both", description="Stages to time.")
    detector: DetectorConfig = RetinaNetConfig()
    backbone: BackboneConfig = BackboneConfig()
    batch_size: int = Field(REFERENCE_BATCH, ge=1, description="Images per step on one device.")
    short_side: Sides | None = Field(
        None, description="Short sides in pixels (or 400..1400), one of which is drawn (the stages')."
    )
    long_side: Side = Field(1333, description="Largest long side in pixels.")
    num_proposals: int = Field(30, ge=0, description="Proposals per image in pre-training.")
    steps: int | None = Field(None, ge=1, description="Number of steps that are timed (3 on a CPU, 60 on a GPU).")


@dataclass(frozen=True)
class BenchPlan:
    """A stage to time, and what its `prepare` would find out."""

    config: BenchConfig
    image_set: ImageSet
    stage: StageName

    @property
    def detector(self) -> DetectorConfig:
        """The detector; pre-training has no classes of pixels, so it is without a semantic branch there."""
        detector = self.config.detector
        if self.stage == "pretrain-box" and semantic_classes_of(detector):
            return detector.model_copy(update={"semantic_classes": 0})
        return detector

    @property
    def semantic_classes(self) -> int:
        """Classes of pixels of the samples; 0: they have none."""
        return semantic_classes_of(self.detector)

    @property
    def recipe(self) -> Recipe:
        """Recipe of the detector with a supervised backbone."""
        return recipe_for(self.config.detector, self.config.backbone, WeightsTraining())

    @property
    def rates(self) -> Rates:
        """Rates of the stage."""
        return self.recipe.pretrain if self.stage == "pretrain-box" else self.recipe.finetune

    @property
    def settings(self) -> LoopSettings:
        """Settings of the loop, at the learning rate of an early step: random weights diverge at the full rate."""
        config, rates = self.config, self.rates
        training = TrainingConfig(batch_size=config.batch_size, lr=rates.lr / 1000)
        num_images = len(self.image_set)
        return resolve_settings(training, rates, num_images=num_images, seed=config.seed, runtime=config.runtime)

    @property
    def short_sides(self) -> tuple[int, ...]:
        """Short sides in pixels, one of which is drawn for an image."""
        of_recipe = self.recipe.short_sides if self.stage == "finetune" else None
        return self.config.short_side or of_recipe or MULTI_SCALE

    @property
    def num_classes(self) -> int:
        """Number of classes that the detector tells apart."""
        if self.stage == "finetune":
            return len(self.image_set.categories)
        return NUM_CLUSTERS if self.config.detector.RECIPE.needs_clusters else 1

    def build_views(self) -> TwoViews | LabelledViews:
        """Return the module that the loop trains, on the CPU, with random weights."""
        config = self.config
        if self.stage == "pretrain-box":
            given = {"short_side": config.short_side} if config.short_side else {}
            asked = PretrainBoxConfig(
                detector=self.detector,
                backbone=config.backbone,
                seed=config.seed,
                views=ViewsConfig(long_side=config.long_side, **given),
            )
            built = pretrain_box.build_views(asked, self.settings, self.num_classes)
            assert isinstance(built, TwoViews), "AlignDet is the default"
            return built
        sides = ResolutionConfig(short_side=config.short_side, long_side=config.long_side)
        resolution = resolve_resolution(sides, self.recipe.policy, self.short_sides)
        detector = settle_neck_norm(config.detector, self.recipe.neck_norm)
        return build_views(detector, config.backbone, self.num_classes, resolution, config.seed)


def bench_batches(plan: BenchPlan, num_steps: int, process: Process) -> Generator[list[Sample], None, None]:
    """Yield batches of images with their labels, or in pre-training with random proposals; close it in the end."""
    config, images = plan.config, plan.image_set
    boxes: BoxSource = LabelBoxes(images)
    masks = pixel_classes = None
    if plan.stage == "pretrain-box":
        boxes = DrawnProposals(images, config.num_proposals, plan.num_classes)
    elif config.detector.RECIPE.needs_masks:
        masks = LabelMasks(images)
    if plan.semantic_classes:
        pixel_classes = DrawnPixelClasses(plan.semantic_classes)
    return batches_of_run(
        SampleStream(images, range(len(images)), boxes, "skip", masks, pixel_classes),
        config.batch_size,
        steps=range(num_steps),
        seed=config.seed,
        num_workers=config.runtime.num_workers,
        process=process,
    )
