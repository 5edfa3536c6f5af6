"""The base of methods that train one detector on one view of each image."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import make_batch
from aligndet_cli.detectors import Detector
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.method import Pretext
from aligndet_cli.pretrain_box.views import ViewChanges, draw_views
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.trial import worst_sizes

VIEW = 1


class OneView(Pretext):
    """Base of such a module: the detector with its frozen parts, and the view.

    Args:
        model: trained in place.
        config: its views, seed and `freeze_backbone` are used.
        settings: its `is_logged` is used.
        changes: kinds of random changes of an image.

    Attributes:
        frozen: modules whose norms keep their statistics in training; subclasses may add some.
    """

    def __init__(
        self, model: Detector, config: PretrainBoxConfig, settings: LoopSettings, changes: ViewChanges
    ) -> None:
        super().__init__()
        self.model, self.config, self.settings, self.changes = model, config, settings, changes
        self.largest_hw = worst_sizes(config.views.short_side, config.views.long_side)[0]
        for name in (*model.fresh_modules, *(["backbone"] if config.freeze_backbone else [])):
            model.get_submodule(name).requires_grad_(False)
        self.frozen: list[nn.Module] = [model.backbone] if config.freeze_backbone else []
        self.train()

    @property
    def detector(self) -> Detector:
        """The only detector."""
        return self.model

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen modules."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def compiled_parts(self) -> Sequence[Detector]:
        """Return the detector."""
        return (self.model,)

    @property
    def device(self) -> torch.device:
        """The training device."""
        return next(self.parameters()).device

    def make_view(self, samples: Sequence[Sample]) -> tuple[ImageBatch, list[BoxTargets]]:
        """Return the view of B samples, with their proposals, on the device of the detector."""
        params = draw_views(samples, VIEW, self.config.views, self.config.seed, self.changes)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return make_batch(samples, params, self.device)
