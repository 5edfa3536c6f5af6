"""From samples to two views, and to the losses of the pretext, on the training device."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import ViewParams, draw_view, make_batch
from aligndet_cli.pretrain_box.pretext import BoxPretext
from aligndet_cli.training.learner import ViewLosses
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.schedules import momentum_at
from aligndet_cli.training.trial import worst_sizes

VIEWS = (1, 2)


class TwoViews(ViewLosses):
    """Two independent views of every sample, and the losses of the pretext on them.

    Args:
        short_sides: short sides in pixels, one of which is drawn for each image and view.
        momentum: coefficient of the momentum copies at the start of the run, see `momentum_at`.
        settings: its `seed`, `is_logged` and length are used; health numbers cost an eigendecomposition.
    """

    def __init__(
        self,
        pretext: BoxPretext,
        *,
        short_sides: Sequence[int],
        long_side: int,
        momentum: float,
        settings: LoopSettings,
    ) -> None:
        super().__init__()
        self.pretext = pretext
        self.short_sides, self.long_side = tuple(short_sides), long_side
        self.momentum, self.settings = momentum, settings
        self.largest_hw = worst_sizes(short_sides, long_side)[0]

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return scalar losses of B samples, and scalars that are only logged; both views have the same proposals."""
        views = []
        device = next(self.parameters()).device
        for number in VIEWS:
            params = draw_views(samples, number, self.short_sides, self.long_side, self.settings.seed)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                views.append(make_batch(samples, params, device, instance_offset=0))
        return self.pretext(*views, with_health=self.settings.is_logged(step))

    def compiled_parts(self) -> Sequence[nn.Module]:
        """Return both detectors."""
        return self.pretext.online, self.pretext.momentum

    def after_step(self, step: int) -> None:
        """Update the momentum copies."""
        self.pretext.update_momentum(momentum_at(step, self.settings.schedule.num_steps, self.momentum))


def draw_views(
    samples: Sequence[Sample], number: int, short_sides: Sequence[int], long_side: int, seed: int
) -> list[ViewParams]:
    """Draw the parameters of view `number` (of `VIEWS`) for each of B samples."""
    return [draw_view((seed, sample.position, number), short_sides, long_side, with_colour=True) for sample in samples]
