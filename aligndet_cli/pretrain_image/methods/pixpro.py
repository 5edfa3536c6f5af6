"""PixPro: a place in a view, smoothed over places that look alike, predicts the places near it in the other view."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from aligndet_cli.backbones import Backbone
from aligndet_cli.pretrain_image.method import ImageMethod, Losses, View, places_of
from aligndet_cli.training.embeddings import embedding_health
from aligndet_cli.training.projector import build_projector

MAX_DISTANCE = 0.7  # between a place and its positives, by the diagonal of the larger cell
SHARPNESS = 2  # gamma of the similarities in the propagation


class PixPro(ImageMethod):
    """Backbone, projector and propagation, and momentum copies of the first two.

    Args:
        backbone: trained in place.
        embedding_dim: D of the projector.
        hidden_dim: its hidden width.

    Source: Xie et al., CVPR 2021, §3.2-3.3, and zdaxie/PixPro, whose propagation normalises the transformed features;
        PixPro alone, without the instance branch. Distances are in pixels of the image as in the paper, not in shares
        of its sides.
    """

    best = -4.0

    def __init__(self, backbone: Backbone, *, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = build_projector(backbone.channels["c5"], hidden_dim, embedding_dim)
        self.transform = nn.Linear(embedding_dim, embedding_dim)
        self.momentum_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def copies(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return the momentum copies."""
        return (self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)

    def forward(self, views: Sequence[View], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the loss of two views, (B, 3, S, S) each, -4 at best; classes are not used."""
        first, second = views
        with torch.no_grad():
            wanted = [_project(self.momentum_backbone, self.momentum_projector, view) for view in views]
        projected = [_project(self.backbone, self.projector, view) for view in views]  # (B, P, D)
        predicted = [propagate(one, self.transform(one)) for one in projected]
        with torch.autocast(first.pixels.device.type, enabled=False):
            is_near = near_places(first.corners, second.corners, math.isqrt(projected[0].shape[1]))  # (B, P, P)
            loss = pixpro_loss(predicted[0], wanted[1], is_near)
            loss = loss + pixpro_loss(predicted[1], wanted[0], is_near.transpose(1, 2))
        shown = {"near_places": is_near.any(dim=2).float().mean()} if with_health else {}
        if with_health:
            shown |= embedding_health(normalize(projected[0].detach().flatten(0, 1).float(), dim=1))
        return {"loss_similarity": loss}, shown


def _project(backbone: nn.Module, projector: nn.Module, view: View) -> Tensor:
    """Return the embeddings (B, P, D) of the places of a view; a 1x1 convolution is a linear layer on each."""
    places = places_of(backbone, view.pixels)
    embeddings: Tensor = projector(places.flatten(0, 1))
    return embeddings.view(*places.shape[:2], -1)


def propagate(embeddings: Tensor, transformed: Tensor) -> Tensor:
    """Return, for each place, the sum (B, P, D) of transformed embeddings of all places, by their similarity to it.

    Args:
        embeddings: (B, P, D), whose cosines, if positive, to the power of gamma are the weights.
        transformed: (B, P, D).

    Source: PixPro eqs. 3 and 4.
    """
    directions = normalize(embeddings, dim=2)
    weights = (directions @ directions.transpose(1, 2)).clamp(min=0) ** SHARPNESS  # (B, P, P)
    return weights @ normalize(transformed, dim=2)


def near_places(corners: Tensor, other_corners: Tensor, num_cells: int) -> Tensor:
    """Return which places of two views of an image are near each other: (B, P, P) bool, P = n * n.

    Args:
        corners, other_corners: (B, 4) of the views, see `View`.
        num_cells: n, cells of a map along a side.

    Source: PixPro eq. 1: the distance of their centres, by the diagonal of a cell; of the larger one in the code.
    """
    centres, diagonals = _cells(corners, num_cells)
    other_centres, other_diagonals = _cells(other_corners, num_cells)
    distances = torch.cdist(centres, other_centres, compute_mode="donot_use_mm_for_euclid_dist")  # (B, P, P)
    return distances < MAX_DISTANCE * torch.maximum(diagonals, other_diagonals)[:, None, None]


def _cells(corners: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Return the centres (B, P, 2) x, y of the cells of a view, row after row, and the diagonal (B,) of one."""
    sizes = (corners[:, 2:] - corners[:, :2]) / num_cells  # (B, 2); negative widths run from right to left
    steps = torch.arange(num_cells, device=corners.device) + 0.5
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    places = torch.stack([columns, rows], dim=-1).view(1, -1, 2)  # (1, P, 2)
    return corners[:, None, :2] + places * sizes[:, None], sizes.norm(dim=1)


def pixpro_loss(predicted: Tensor, wanted: Tensor, is_near: Tensor) -> Tensor:
    """Return the scalar -2 times the mean cosine of the near places of an image; the mean over images, 0 without any.

    Args:
        predicted, wanted: (B, P, D) of either view; the second are constants.
        is_near: (B, P, P).

    Source: PixPro eq. 5, and its code, which counts every direction twice.
    """
    cosines = normalize(predicted.float(), dim=2) @ normalize(wanted.float(), dim=2).transpose(1, 2)  # (B, P, P)
    return (-2 * (cosines * is_near).sum(dim=(1, 2)) / (is_near.sum(dim=(1, 2)) + 1e-6)).mean()
