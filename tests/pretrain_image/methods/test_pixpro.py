"""PixPro beside a second implementation; near places and the propagation by hand."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from aligndet_cli.pretrain_image.method import View
from aligndet_cli.pretrain_image.methods.pixpro import PixPro, near_places, pixpro_loss, propagate
from helpers.image_methods import BATCH, assert_same_as_plain, disturb_copies, perceptron, small_backbone, views

CELLS = 2  # along a side of a map of 64 pixels


def small() -> PixPro:
    return PixPro(small_backbone(), embedding_dim=8, hidden_dim=12)


def test_places_are_near_by_the_larger_cell() -> None:
    # Cells of 4 x 3 pixels, diagonal 5, and of 8 x 6, diagonal 10: up to 7 pixels are near.
    small_cells = torch.tensor([[0.0, 0.0, 8.0, 6.0]])  # centres (2, 1.5) (6, 1.5) (2, 4.5) (6, 4.5)
    large_cells = torch.tensor([[0.0, 0.0, 16.0, 12.0]])  # centres (4, 3) (12, 3) (4, 9) (12, 9)
    expected = [
        [True, False, False, False],  # distances 2.5, 10.1, 7.8, 12.5
        [True, True, False, False],  # 2.5, 6.2, 7.8, 9.6
        [True, False, True, False],  # 2.5, 10.1, 4.9, 11.0
        [True, True, True, False],  # 2.5, 6.2, 4.9, 7.5
    ]
    assert near_places(small_cells, large_cells, CELLS).tolist() == [expected]
    assert near_places(large_cells, small_cells, CELLS)[0].T.tolist() == expected
    flipped = torch.tensor([[8.0, 0.0, 0.0, 6.0]])  # its columns run from right to left
    rows = [expected[place] for place in (1, 0, 3, 2)]
    assert near_places(flipped, large_cells, CELLS).tolist() == [rows]
    assert not near_places(small_cells, small_cells + 100, CELLS).any()


def test_propagation_by_hand() -> None:
    embeddings = torch.tensor([[[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]])
    # Squared cosines: of the first two 1/2, of opposite or obtuse ones 0. The values are normalised.
    values = torch.tensor([[[3.0, 0.0], [0.0, 5.0], [0.0, -1.0]]])
    expected = torch.tensor([[[1.0, 0.5], [0.5, 1.0], [0.0, -1.0]]])
    torch.testing.assert_close(propagate(embeddings, values), expected)


def test_an_image_without_near_places_counts_as_zero() -> None:
    one = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]], requires_grad=True)
    is_near = torch.tensor([[[True]], [[False]]])
    loss = pixpro_loss(one, one.detach(), is_near)
    assert float(loss.detach()) == pytest.approx(-1.0, abs=1e-5)  # the mean of -2 and 0
    loss.backward()
    assert one.grad is not None and one.grad.isfinite().all()


def test_loss_and_gradients_are_those_of_a_plain_implementation() -> None:
    method = small().double()
    disturb_copies(method)

    def plain(made: Sequence[View]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for view, other in (made, made[::-1]):
            projected = perceptron(method.projector, rows_of(method.backbone, view)).view(BATCH, 4, -1)
            with torch.no_grad():
                wanted = perceptron(method.momentum_projector, rows_of(method.momentum_backbone, other))
                wanted = wanted.view(BATCH, 4, -1)
            for image in range(BATCH):
                smooth = [plain_propagation(method, projected[image], place) for place in range(4)]
                cosines = [
                    smooth[i] @ wanted[image, j] / smooth[i].norm() / wanted[image, j].norm()
                    for i in range(4)
                    for j in range(4)
                    if is_near(view.corners[image], other.corners[image], i, j)
                ]
                if cosines:
                    total = total - 2 * sum(cosines) / (len(cosines) + 1e-6) / BATCH
        return total

    assert_same_as_plain(method, views(side=64, dtype=torch.float64), "loss_similarity", plain)


def rows_of(backbone: torch.nn.Module, view: View) -> Tensor:
    return backbone(view.pixels)["c5"].permute(0, 2, 3, 1).reshape(-1, 512)


def plain_propagation(method: PixPro, places: Tensor, at: int) -> Tensor:
    total = torch.zeros_like(places[0])
    for other in places:
        value = method.transform(other)
        cosine = places[at] @ other / places[at].norm() / other.norm()
        total = total + max(cosine, 0) ** 2 * value / value.norm()
    return total


def is_near(corners: Tensor, other_corners: Tensor, place: int, other_place: int) -> bool:
    centres, diagonals = [], []
    for (x1, y1, x2, y2), number in ((corners.tolist(), place), (other_corners.tolist(), other_place)):
        row, column = divmod(number, CELLS)
        centres.append((x1 + (column + 0.5) * (x2 - x1) / CELLS, y1 + (row + 0.5) * (y2 - y1) / CELLS))
        diagonals.append(math.hypot(x2 - x1, y2 - y1) / CELLS)
    return math.dist(*centres) < 0.7 * max(diagonals)


def test_the_log_says_how_many_places_have_near_ones() -> None:
    method = small()
    losses, shown = method(views(side=64), None, with_health=True)
    assert -4 <= float(losses["loss_similarity"].detach()) <= 4 and method.best == -4
    assert 0 < float(shown["near_places"]) <= 1 and {"embedding_rank", "embedding_spread"} <= shown.keys()
    assert len(method.copies()) == 2
