"""From samples to two views, and to the losses of the pretext, on the training device."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from aligndet_cli.config import Frozen, Side
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import ViewParams, draw_view, make_batch
from aligndet_cli.pretrain_box.pretext import BoxPretext
from aligndet_cli.training.learner import ViewLosses
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.schedules import momentum_at
from aligndet_cli.training.trial import worst_sizes

VIEWS = (1, 2)


class ViewsConfig(Frozen):
    """Resolution of the two views."""

    # AlignDet §4.1; coco_soft-teacher.py
    short_side: tuple[Side, ...] = Field(
        (640, 672, 704, 736, 768, 800),
        min_length=1,
        description="Short sides in pixels, one of which is drawn for each view.",
    )
    long_side: Side = Field(1333, description="Largest long side in pixels.")


class TwoViews(ViewLosses):
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

    def compiled_parts(self) -> Sequence[nn.Module]:
        """Return both detectors."""
        return self.pretext.online, self.pretext.momentum

    def after_step(self, step: int) -> None:
        """Update the momentum copies."""
        self.pretext.update_momentum(momentum_at(step, self.settings.schedule.num_steps, self.momentum))


def draw_views(samples: Sequence[Sample], number: int, resolution: ViewsConfig, seed: int) -> list[ViewParams]:
    """Draw the parameters of view `number` (of `VIEWS`) for each of B samples."""
    sides = resolution.short_side, resolution.long_side
    return [draw_view((seed, sample.position, number), *sides, with_colour=True) for sample in samples]
