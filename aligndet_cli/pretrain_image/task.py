"""From samples to views, and to the losses of a method, on the training device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aligndet_cli.data.crops import CropParams, ViewRecipe, draw_crop, make_views
from aligndet_cli.data.sample import Sample
from aligndet_cli.pretrain_image.method import ImageMethod, View
from aligndet_cli.pretrain_image.recipes import MethodRecipe
from aligndet_cli.training.learner import ViewLosses
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.schedules import momentum_at


class ImageTask(ViewLosses):
    """Independent views of every sample, and the losses of a method on them.

    Args:
        recipe: its `views` and `momentum_rises` are used.
        side: side of the square views in pixels.
        class_ids: (images,) int64 for the whole `ImageSet`; None if the method needs none.
        momentum: coefficient of the method's momentum copy at the start, if it has one.
        settings: its `seed`, `is_logged` and length are used; health numbers cost an eigendecomposition.
    """

    def __init__(
        self,
        method: ImageMethod,
        recipe: MethodRecipe,
        *,
        side: int,
        class_ids: NDArray[np.int64] | None,
        momentum: float,
        settings: LoopSettings,
    ) -> None:
        super().__init__()
        self.method, self.recipe, self.side = method, recipe, side
        self.class_ids, self.momentum, self.settings = class_ids, momentum, settings
        self.train()

    def layers(self) -> Sequence[Sequence[nn.Module]]:
        """Return the layers of the backbone."""
        return self.method.backbone.layers()

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return scalar losses of B samples, and scalars that are only logged, by name."""
        device = next(self.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            views = [
                self._view(samples, number, recipe, device) for number, recipe in enumerate(self.recipe.views, start=1)
            ]
            class_ids = None
            if self.class_ids is not None:
                class_ids = torch.from_numpy(self.class_ids[[sample.index for sample in samples]])
                class_ids = class_ids.to(device, non_blocking=True)
        return self.method(views, class_ids, with_health=self.settings.is_logged(step))

    def after_step(self, step: int) -> None:
        """Update the momentum copy of the method, if it has one."""
        rises = self.recipe.momentum_rises
        num_steps = self.settings.schedule.num_steps
        self.method.update_momentum(momentum_at(step, num_steps, self.momentum) if rises else self.momentum)

    def _view(self, samples: Sequence[Sample], number: int, recipe: ViewRecipe, device: torch.device) -> View:
        seeds = [(self.settings.seed, sample.position, number) for sample in samples]
        params = [
            draw_crop(seed, sample.size_hw, self.side, recipe) for seed, sample in zip(seeds, samples, strict=True)
        ]
        corners = torch.tensor([corners_of(one) for one in params], dtype=torch.float32)
        return View(make_views(samples, params, self.side, device), corners.to(device, non_blocking=True))


def corners_of(params: CropParams) -> tuple[int, int, int, int]:
    """Return the corners of a view in its image, see `View.corners`."""
    top, left, height, width = params.box
    right = left + width
    return (right, top, left, top + height) if params.flip else (left, top, right, top + height)
