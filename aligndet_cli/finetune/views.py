"""From labelled samples to the losses of a detector, on the training device."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aligndet_cli.data.transforms import Sample, draw_view, make_batch
from aligndet_cli.detectors import AnyDetector


class LabelledViews(nn.Module):
    """Draws one view of every sample, without colour changes, and runs the detector on it.

    Args:
        short_sides: resolutions to choose from, one per image.
    """

    def __init__(self, model: AnyDetector, *, short_sides: Sequence[int], long_side: int, seed: int) -> None:
        super().__init__()
        self.model = model
        self.short_sides, self.long_side, self.seed = tuple(short_sides), long_side, seed
        self.train()

    def forward(self, samples: Sequence[Sample], _step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of one batch; nothing beside them is shown."""
        params = [
            draw_view((self.seed, sample.position, 0), self.short_sides, self.long_side, with_colour=False)
            for sample in samples
        ]
        device = next(self.model.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, targets = make_batch(samples, params, device)
        return self.model(images, targets), {}
