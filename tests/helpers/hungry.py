"""A learner whose steps take a known amount of memory, for tests whose child processes import it."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from aligndet_cli.data.sample import Sample
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.loop import Learner, LoopSettings
from aligndet_cli.training.schedules import Schedule
from aligndet_cli.training.trial import Trial, worst_sizes

SIZES_HW = worst_sizes((100,), 200)  # 100 x 200 and 200 x 100: 20,000 pixels


class Hungry(nn.Module):
    """Takes so many bytes for every pixel, and some once."""

    def __init__(self, per_pixel: int, at_once: int, problem: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.kept = torch.ones(at_once, dtype=torch.uint8)
        self.per_pixel, self.problem = per_pixel, problem

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.problem:
            raise ValueError(self.problem)
        pixels = sum(sample.image[0].numel() for sample in samples)
        taken = torch.ones(pixels * self.per_pixel, dtype=torch.uint8)
        return {"loss_a": self.weight.sum() + taken[0]}, {}


def build(per_pixel: int, at_once: int, problem: str, process: Process) -> Learner:
    """What the loop would train."""
    model = Hungry(per_pixel, at_once, problem)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), {"model": model})


def hungry_trial(per_pixel: int = 0, at_once: int = 0, problem: str = "") -> Trial:
    """Steps of that learner on images of 100 x 200 pixels."""
    return Trial(
        build=partial(build, per_pixel, at_once, problem),
        settings=LoopSettings(schedule=Schedule(10, 0, ()), base_lr=0.1, weight_decay=0.0, seed=0),
        sizes_hw=SIZES_HW,
        num_boxes=3,
        num_classes=2,
        num_images=100,
        gaps=2.0,
        pools_regions=True,
    )
