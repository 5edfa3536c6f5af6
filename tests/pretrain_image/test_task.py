"""Views with their place in the image, and the momentum over a run."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from aligndet_cli.data.crops import CropParams
from aligndet_cli.data.sample import Sample
from aligndet_cli.pretrain_image.method import ImageMethod, Losses, View
from aligndet_cli.pretrain_image.recipes import RECIPES, MethodName
from aligndet_cli.pretrain_image.task import ImageTask, corners_of
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.schedules import Schedule

SETTINGS = LoopSettings(schedule=Schedule(8, 0, ()), base_lr=0.1, weight_decay=0.0, seed=3)


class Listening(ImageMethod):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.views: list[View] = []
        self.momenta: list[float] = []

    def forward(self, views: Sequence[View], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        self.views = list(views)
        return {}, {}

    def update_momentum(self, coefficient: float) -> None:
        self.momenta.append(coefficient)


def task_of(method: MethodName) -> tuple[ImageTask, Listening]:
    listening = Listening()
    task = ImageTask(listening, RECIPES[method], side=32, class_ids=None, momentum=0.9, settings=SETTINGS)
    return task, listening


def test_corners_run_backwards_in_flipped_views() -> None:
    assert corners_of(CropParams((2, 3, 10, 20))) == (3, 2, 23, 12)
    assert corners_of(CropParams((2, 3, 10, 20), flip=True)) == (23, 2, 3, 12)


def test_pixels_come_from_where_the_corners_say() -> None:
    """Red grows to the right and green downwards, so a view's means tell where it was; colours stay as they are."""
    columns, rows = torch.meshgrid(torch.arange(61), torch.arange(47), indexing="xy")
    image = torch.stack([4 * columns, 5 * rows, torch.zeros_like(rows)]).to(torch.uint8)
    samples = [Sample(n, n, image, torch.empty(0, 4), torch.empty(0, dtype=torch.int64)) for n in range(8)]
    task, listening = task_of("supervised")
    task(samples, 0)
    [view] = listening.views
    mean, std = torch.tensor([0.485, 0.456]), torch.tensor([0.229, 0.224])
    half = view.pixels.shape[3] // 2
    left, right = (part.mean(dim=(2, 3))[:, :2] * std + mean for part in view.pixels.split(half, dim=3))
    x1, y1, x2, y2 = view.corners.T
    found_x, found_y = (left + right)[:, 0] / 2 * 255 / 4 + 0.5, (left + right)[:, 1] / 2 * 255 / 5 + 0.5
    torch.testing.assert_close(found_x, (x1 + x2) / 2, atol=0.5, rtol=0)
    torch.testing.assert_close(found_y, (y1 + y2) / 2, atol=0.5, rtol=0)
    assert ((left[:, 0] < right[:, 0]) == (x1 < x2)).all() and len(set((x1 < x2).tolist())) == 2


@pytest.mark.parametrize(("method", "momenta"), [("moco-v2", [0.9, 0.9, 0.9]), ("byol", [0.9, 0.95, 1.0])])
def test_momentum_rises_where_the_paper_says_so(method: MethodName, momenta: list[float]) -> None:
    task, listening = task_of(method)
    for step in (0, 4, 8):  # 1 - 0.1 * (cos(pi * step / 8) + 1) / 2
        task.after_step(step)
    assert listening.momenta == pytest.approx(momenta)


def test_the_views_of_byol_differ_in_kind() -> None:
    first, second = RECIPES["byol"].views
    assert (first.blur_p, second.blur_p, first.solarize_p, second.solarize_p) == (1.0, 0.1, 0.0, 0.2)
