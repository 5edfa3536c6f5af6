"""Clusters as classes: every family's own training on labels, with proposals for boxes and clusters for classes.

Source: AptDet, the step of cluster labels, for DETR; here for every family. Its clusters come from `aligndet cluster`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from aligndet_cli.data.sample import Sample
from aligndet_cli.detectors.parts.two_stage import RCNN
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.health import judge_losses
from aligndet_cli.pretrain_box.method import Inputs, Method, Shown, build_seeded_backbone
from aligndet_cli.pretrain_box.methods.one_view import VIEW, OneView
from aligndet_cli.pretrain_box.pictures import show_views
from aligndet_cli.pretrain_box.views import ALL_CHANGES


class ClassViews(OneView):
    """One view of every sample, and the detector's losses on its proposals and their clusters."""

    @property
    def left_out(self) -> Sequence[str]:
        """The modules with outputs per cluster, which fit no other classes."""
        return self.model.class_modules

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scalar losses of `Detector.forward` on B samples, without those of masks, and nothing to log."""
        images, targets = self.make_view(samples)
        if isinstance(self.model, RCNN):
            return RCNN.forward(self.model, images, targets), {}
        losses: dict[str, Tensor] = self.model(images, targets)
        return losses, {}


class Classes(Method):
    """A detector that learns clusters as if they were labels."""

    idle = ("projector", "temperature", "momentum", "tasks", "objectness", "embedder")

    def build(self, config: PretrainBoxConfig, inputs: Inputs) -> ClassViews:
        """Return a detector of as many classes as there are clusters, with its view."""
        backbone = build_seeded_backbone(config, inputs.weights)
        model = self.detector_config(config).build(backbone, inputs.num_classes)
        return ClassViews(model, config, inputs.settings, ALL_CHANGES)

    def judge(self, metrics: Path) -> dict[str, Any]:
        """Return the verdict on the sum of the losses."""
        return judge_losses(metrics)

    def show(self, config: PretrainBoxConfig, sample: Sample) -> Shown:
        """Return the view."""
        return show_views(sample, config.views, config.seed, (VIEW,))
