"""The exponential moving average of a model's weights (`--ema`)."""

import copy

import torch
from torch import nn


class MovingAverage(nn.Module):
    """A copy of a model whose weights follow those of the model slowly; in evaluation mode, and never trained.

    Running statistics of norms are averaged as weights are, so that they fit the averaged weights; counters are copied.
    What is frozen stays as it is, to the bit.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._pairs = [
            (mean, value)
            for own, other in ((self.model.parameters(), model.parameters()), (self.model.buffers(), model.buffers()))
            for mean, value in zip(own, other, strict=True)
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the model after an optimizer step (0-based)."""
        share = 1.0 - decay_at(step, self.decay)
        floats = [(mean, value) for mean, value in self._pairs if mean.is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floats], [value.detach() for _, value in floats], share)
        for mean, value in self._pairs:
            if not mean.is_floating_point():
                mean.copy_(value)


def decay_at(step: int, decay: float) -> float:
    """Return the decay of the average after a step (0-based): lower in the first steps, which follow fast."""
    return min(decay, (1 + step) / (10 + step))
