"""BYOL beside a second implementation, and its momentum."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from aligndet_cli.pretrain_image.method import View
from aligndet_cli.pretrain_image.methods.byol import BYOL, byol_loss
from helpers.image_methods import assert_same_as_plain, disturb_copies, perceptron, small_backbone, views


def small() -> BYOL:
    return BYOL(small_backbone(), embedding_dim=8, hidden_dim=12)


def test_loss_by_hand() -> None:
    predicted = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    wanted = torch.tensor([[2.0, 0.0], [0.0, 5.0]])  # cosines 0.6 and 0: 2 - 1.2 and 2
    assert float(byol_loss(predicted, wanted)) == pytest.approx((0.8 + 2.0) / 2)
    assert float(byol_loss(predicted, 7 * predicted)) == pytest.approx(0, abs=1e-6)
    assert float(byol_loss(predicted, -predicted)) == pytest.approx(4)


def test_loss_and_gradients_are_those_of_a_plain_implementation() -> None:
    byol = small().double()
    disturb_copies(byol)

    def plain(made: Sequence[View]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for view, other in (made, made[::-1]):
            features = byol.backbone(view.pixels)["c5"].flatten(2).mean(dim=2)
            predicted = perceptron(byol.predictor, perceptron(byol.projector, features))
            with torch.no_grad():
                features = byol.momentum_backbone(other.pixels)["c5"].flatten(2).mean(dim=2)
                wanted = perceptron(byol.momentum_projector, features)
            for one, two in zip(predicted, wanted, strict=True):
                total = total + ((one / one.norm() - two / two.norm()) ** 2).sum() / len(predicted)
        return total

    assert_same_as_plain(byol, views(dtype=torch.float64), "loss_similarity", plain)


def test_the_copies_follow_but_for_the_predictor() -> None:
    byol = small()
    _, shown = byol(views(), None, with_health=True)
    assert float(shown["chance"]) == 4 and {"embedding_rank", "embedding_spread"} <= shown.keys()
    with torch.no_grad():
        byol.projector[0].weight.add_(1.0)
        byol.backbone.conv1.weight.add_(2.0)
    before = [byol.momentum_projector[0].weight.clone(), byol.momentum_backbone.conv1.weight.clone()]
    byol.update_momentum(0.75)
    torch.testing.assert_close(byol.momentum_projector[0].weight, before[0] + 0.25)
    torch.testing.assert_close(byol.momentum_backbone.conv1.weight, before[1] + 0.5)
