"""Small modules of each method of `pretrain-box`, and images with boxes for them."""

from typing import Any

import torch

from aligndet_cli.data.sample import Sample
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.method import Inputs, Pretext
from aligndet_cli.pretrain_box.methods import METHODS
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.schedules import Schedule
from helpers.small_detectors import SMALL

SETTINGS = LoopSettings(Schedule(10, 0, ()), base_lr=0.1, weight_decay=0.0, seed=3, log_every=1)


def config_of(method: str, family: str, **settings: Any) -> PretrainBoxConfig:
    return PretrainBoxConfig.model_validate(
        {
            "method": method,
            "detector": SMALL[family].model_dump(),
            "backbone": {"name": "resnet18", "weights": "none"},
            "views": {"short_side": (64,), "long_side": 120},
            "seed": SETTINGS.seed,
            **settings,
        }
    )


def build(method: str, family: str, *, num_classes: int = 1, **settings: Any) -> Pretext:
    config = config_of(method, family, **settings)
    return METHODS[config.method].build(config, Inputs(SETTINGS, num_classes))


def draw_samples(
    counts: tuple[int, ...], *, num_classes: int = 1, size_hw: tuple[int, int] = (80, 112)
) -> list[Sample]:
    """Images of noise, with boxes of at least 20 pixels."""
    generator = torch.Generator().manual_seed(1)
    height, width = size_hw
    made = []
    for position, count in enumerate(counts):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width - 44.0, height - 44.0])
        boxes = torch.cat([corner, corner + 20 + 24 * torch.rand(count, 2, generator=generator)], dim=1)
        class_ids = torch.randint(num_classes, (count,), generator=generator)
        made.append(Sample(position, position, image, boxes, class_ids))
    return made


def assert_gradients_reach_what_is_trained(module: Pretext) -> None:
    """Every trainable parameter has a gradient after a backward pass, and nothing else has one."""
    wrong = [name for name, p in module.named_parameters() if (p.grad is not None) != p.requires_grad]
    assert wrong == []
