"""From samples to the two views of the pretext, on the training device."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import ViewParams, draw_view, make_batch
from aligndet_cli.pretrain_box.pretext import BoxPretext
from aligndet_cli.training.batch_size import worst_sizes
from aligndet_cli.training.learner import ViewLosses
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.schedules import momentum_at

VIEWS = (1, 2)


class TwoViews(ViewLosses):
    """Draws two independent views of every sample and runs the pretext on them.

    Args:
        short_sides: resolutions to choose from, one per image and view.
        momentum: of the momentum copies at the start of the run, see `momentum_at`.
        settings: their seed is used, and their `is_logged`: health numbers cost an eigendecomposition.
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
        """Losses and shown numbers of one batch. Proposal i of view 1 is proposal i of view 2."""
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
        """Move the momentum copies towards what was trained."""
        self.pretext.update_momentum(momentum_at(step, self.settings.schedule.num_steps, self.momentum))


def draw_views(
    samples: Sequence[Sample], number: int, short_sides: Sequence[int], long_side: int, seed: int
) -> list[ViewParams]:
    """What is done to each sample to make its view `number` (of `VIEWS`)."""
    return [draw_view((seed, sample.position, number), short_sides, long_side, with_colour=True) for sample in samples]
