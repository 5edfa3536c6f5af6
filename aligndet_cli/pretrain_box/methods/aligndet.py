"""AlignDet, the paper's method: a contrast of boxes between two views, and regression of the boxes.

The task itself is in `pretext.py`, its loss in `contrastive.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import make_batch
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.checkpoint import OBJECTNESS
from aligndet_cli.detectors.recipes import RCNN
from aligndet_cli.errors import ConfigError
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.health import judge
from aligndet_cli.pretrain_box.method import Inputs, Method, Pretext, Shown, build_seeded_backbone
from aligndet_cli.pretrain_box.pictures import show_views
from aligndet_cli.pretrain_box.pretext import BoxPretext
from aligndet_cli.pretrain_box.views import VIEWS, ViewsConfig, draw_views
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import Recipe
from aligndet_cli.training.schedules import momentum_at
from aligndet_cli.training.trial import worst_sizes


class TwoViews(Pretext):
    """Two independent views of every sample, and the losses of the pretext on them.

    Args:
        momentum: coefficient of the momentum copies at the start of the run, see `momentum_at`.
        settings: its `seed`, `is_logged` and length are used; health numbers cost an eigendecomposition.
    """

    def __init__(
        self, pretext: BoxPretext, resolution: ViewsConfig, *, momentum: float, settings: LoopSettings
    ) -> None:
        super().__init__()
        self.pretext, self.resolution, self.momentum, self.settings = pretext, resolution, momentum, settings
        self.largest_hw = worst_sizes(resolution.short_side, resolution.long_side)[0]

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return scalar losses of B samples, and scalars that are only logged; both views have the same proposals."""
        views = []
        device = next(self.parameters()).device
        for number in VIEWS:
            params = draw_views(samples, number, self.resolution, self.settings.seed)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                views.append(make_batch(samples, params, device, instance_offset=0))
        return self.pretext(*views, with_health=self.settings.is_logged(step))

    @property
    def detector(self) -> Detector:
        """The online detector."""
        return self.pretext.online

    def extra_parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the projector and, if it was asked for, what scores objects."""
        parts = {"projector": self.pretext.projector.state_dict()}
        if self.detector.trains_objectness:  # apart from the detector's weights, since fine-tuning restarts it
            parts[OBJECTNESS] = self.detector.class_predictor.state_dict()
        return parts

    def compiled_parts(self) -> Sequence[nn.Module]:
        """Return both detectors."""
        return self.pretext.online, self.pretext.momentum

    def after_step(self, step: int) -> None:
        """Update the momentum copies."""
        self.pretext.update_momentum(momentum_at(step, self.settings.schedule.num_steps, self.momentum))


class AlignDet(Method):
    """Two views, a momentum copy, and the losses of `BoxPretext`."""

    idle = ("embedder",)

    def check(self, config: PretrainBoxConfig) -> None:
        """Refuse `--objectness` where it has no effect."""
        super().check(config)
        family = config.detector.family
        if config.objectness and family in RCNN:
            raise ConfigError(
                f"--objectness: no effect, {family} trains such a score in any case (its RPN); leave it out"
            )
        if config.objectness and config.tasks == "contrastive":
            raise ConfigError("--objectness: no effect with --tasks contrastive, which trains no boxes; leave one out")

    def build(self, config: PretrainBoxConfig, inputs: Inputs) -> TwoViews:
        """Return the pretext with its views."""
        pretext = build_pretext(config, inputs.num_classes, inputs.weights)
        return TwoViews(pretext, config.views, momentum=config.momentum, settings=inputs.settings)

    def judge(self, metrics: Path) -> dict[str, Any]:
        """Return the verdict of `health.judge`."""
        return judge(metrics)

    def show(self, config: PretrainBoxConfig, sample: Sample) -> Shown:
        """Return both views."""
        return show_views(sample, config.views, config.seed, VIEWS)

    def describe(self, config: PretrainBoxConfig, recipe: Recipe) -> dict[str, str]:
        """Return the sizes of the projector."""
        projector = config.projector.resolve(recipe.projector)
        width = config.projector.embedding_dim
        return {"projector": f"{projector.hidden_dim} and {width} wide, {projector.start} start"}


def build_pretext(config: PretrainBoxConfig, num_classes: int, weights: Path | None = None) -> BoxPretext:
    """Return the detector with its backbone's weights (random without a file), projector and momentum copies."""
    backbone = build_seeded_backbone(config, weights)
    detector = AlignDet().detector_config(config).build(backbone, num_classes)
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
