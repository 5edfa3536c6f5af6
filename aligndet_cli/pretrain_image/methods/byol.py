"""BYOL: a view predicts what a momentum copy makes of the other view."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from aligndet_cli.backbones import Backbone
from aligndet_cli.pretrain_image.method import ImageMethod, Losses, View, embed
from aligndet_cli.training.embeddings import embedding_health
from aligndet_cli.training.projector import build_projector


class BYOL(ImageMethod):
    """Online backbone, projector and predictor, and momentum copies of the first two.

    Args:
        backbone: trained in place.
        embedding_dim: D of the projector and predictor.
        hidden_dim: hidden width of both.

    Source: Grill et al., NeurIPS 2020, §3.2.
    """

    def __init__(self, backbone: Backbone, *, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = build_projector(backbone.channels["c5"], hidden_dim, embedding_dim)
        self.predictor = build_projector(embedding_dim, hidden_dim, embedding_dim)
        self.momentum_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def copies(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return the momentum copies."""
        return (self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)

    def forward(self, views: Sequence[View], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the loss of two views, (B, 3, S, S) each, 0 at best; classes are not used."""
        with torch.no_grad():
            wanted = [self.momentum_projector(embed(self.momentum_backbone, view.pixels)) for view in views]  # (B, D)
        projected = [self.projector(embed(self.backbone, view.pixels)) for view in views]
        first, second = (self.predictor(one) for one in projected)
        loss = byol_loss(first, wanted[1]) + byol_loss(second, wanted[0])
        shown = {"chance": loss.new_tensor(4.0)}  # of both directions, at right angles
        if with_health:
            shown |= embedding_health(normalize(projected[0].detach().float(), dim=1))
        return {"loss_similarity": loss}, shown


def byol_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Return the scalar mean of the squared distances of embeddings (B, D), L2-normalised first.

    Source: BYOL eq. 2; both directions are summed.
    """
    return (2 - 2 * cosine_similarity(predicted.float(), wanted.float(), dim=1)).mean()
