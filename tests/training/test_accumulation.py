"""`--accumulate` computes the mean of the micro-batches: the large batch, if their losses are divided by equal
numbers."""

import pytest
import torch
from torch import Tensor

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.sample import Sample
from aligndet_cli.detectors import DETECTORS
from aligndet_cli.finetune.views import LabelledViews, Resolution
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.loop import Learner, LoopSettings, train_step, watch_divergence
from aligndet_cli.training.schedules import Schedule
from aligndet_cli.training.trial import draw_samples
from helpers.small_detectors import SMALL


def gradients(family: str, samples: list[Sample], accumulate: int) -> tuple[Tensor, dict[str, float]]:
    """All gradients of a step in one row, and its losses."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="resnet18", norm_eval=True))
    model = SMALL[family].build(backbone, 3)
    task = LabelledViews(model, resolution=Resolution("resize", (64,), 96, 1024), seed=0)
    learner = Learner(task, torch.optim.SGD(model.parameters(), lr=0.0), {"model": model})
    settings = LoopSettings(Schedule(10, 0, ()), base_lr=0.0, weight_decay=0.0, seed=0, accumulate=accumulate)
    losses, _ = train_step(learner, samples, 0, settings, watch_divergence(learner, Process()))
    rows = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat(rows), {name: float(loss) for name, loss in losses.items()}


@pytest.mark.parametrize("family", sorted(DETECTORS))
def test_equal_micro_batches_are_the_large_batch(family: str) -> None:
    """Two images twice: each half has as many positives as the other, so the mean of the halves is the whole."""
    pair = draw_samples(2, [(64, 96)], num_boxes=4, num_classes=3, with_masks=SMALL[family].RECIPE.needs_masks)
    whole, whole_losses = gradients(family, pair * 2, accumulate=1)
    halves, losses = gradients(family, pair * 2, accumulate=2)
    assert losses == pytest.approx(whole_losses, rel=1e-4)
    assert (whole - halves).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize("family", sorted(DETECTORS))
def test_other_micro_batches_are_averaged(family: str) -> None:
    """Exactly what two processes with a half each would do."""
    samples = draw_samples(4, [(64, 96)], num_boxes=4, num_classes=3, with_masks=SMALL[family].RECIPE.needs_masks)
    both, losses = gradients(family, samples, accumulate=2)
    (first, first_losses), (second, second_losses) = (
        gradients(family, samples[part], 1) for part in (slice(2), slice(2, 4))
    )
    assert (both - (first + second) / 2).norm() < 1e-5 * both.norm()
    name = next(name for name in losses if name.startswith("loss_"))
    assert losses[name] == pytest.approx((first_losses[name] + second_losses[name]) / 2, rel=1e-5)
