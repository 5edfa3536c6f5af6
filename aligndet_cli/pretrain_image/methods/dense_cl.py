"""DenseCL: MoCo v2 of whole views, and of places in them that look alike to the backbone."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from aligndet_cli.backbones import Backbone
from aligndet_cli.pretrain_image.method import ImageMethod, Losses, View, places_of
from aligndet_cli.pretrain_image.methods.moco import Queue, build_head, moco_loss
from aligndet_cli.training.embeddings import embedding_health

DENSE_SHARE = 0.5  # lambda


class DenseCL(ImageMethod):
    """Backbone with a global and a dense head, their momentum copies, and a queue for each head.

    Args:
        backbone: trained in place.
        embedding_dim: D of both heads.
        queue_size: Q of both queues.
        temperature: tau of both losses.

    Source: Wang et al., CVPR 2021, §3.2-3.4, and WXinlong/DenseCL: a place is a cell of the backbone's last map; the
        dense queue has the mean embedding of the places of each view. As in MoCo here, no shuffling over GPUs.
    """

    def __init__(self, backbone: Backbone, *, embedding_dim: int, queue_size: int, temperature: float) -> None:
        super().__init__()
        width = backbone.channels["c5"]
        self.temperature = temperature
        self.backbone = backbone
        self.head, self.dense_head = build_head(width, embedding_dim), build_head(width, embedding_dim)
        self.momentum_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        self.momentum_dense_head = copy.deepcopy(self.dense_head).requires_grad_(False)
        self.queue, self.dense_queue = Queue(queue_size, embedding_dim), Queue(queue_size, embedding_dim)

    def copies(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return the momentum copies."""
        return (
            (self.backbone, self.momentum_backbone),
            (self.head, self.momentum_head),
            (self.dense_head, self.momentum_dense_head),
        )

    def forward(self, views: Sequence[View], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the mean of the global and the dense loss of two views, (B, 3, S, S) each, and fill both queues.

        The mean is weighted; classes are not used. Numbers of the contrast are such means, too.
        """
        places = places_of(self.backbone, views[0].pixels)  # (B, P, C)
        queries, dense_queries = self.head(places.mean(dim=1)), self.dense_head(places)  # (B, D), (B, P, D)
        with torch.no_grad():
            other_places = places_of(self.momentum_backbone, views[1].pixels)
            keys = self.momentum_head(other_places.mean(dim=1))
            dense_keys = self.momentum_dense_head(other_places)
        with torch.autocast(places.device.type, enabled=False):
            queries, keys = (normalize(one.float(), dim=1) for one in (queries, keys))
            pooled = normalize(dense_keys.float().mean(dim=1), dim=1)  # (B, D)
            dense_queries, dense_keys = (normalize(one.float(), dim=2) for one in (dense_queries, dense_keys))
            partners = nearest_places(places, other_places)[:, :, None].expand_as(dense_keys)
            dense_keys = dense_keys.gather(1, partners)  # (B, P, D) in the order of the queries
            contrast = moco_loss(queries, keys, self.queue.snapshot(), temperature=self.temperature)
            dense_contrast = moco_loss(
                dense_queries.flatten(0, 1),
                dense_keys.flatten(0, 1),
                self.dense_queue.snapshot(),
                temperature=self.temperature,
            )
        self.queue.push(keys)
        self.dense_queue.push(pooled)
        loss = torch.lerp(contrast.loss, dense_contrast.loss, DENSE_SHARE)
        dense_shown = dense_contrast.shown()
        shown = {name: torch.lerp(one, dense_shown[name], DENSE_SHARE) for name, one in contrast.shown().items()}
        health = embedding_health(queries.detach()) if with_health else {}
        return {"loss_contrastive": loss}, shown | health


@torch.no_grad()
def nearest_places(places: Tensor, others: Tensor) -> Tensor:
    """Return the number (B, P) int64 of the most similar of `others` (B, P, C), by cosine, for each place (B, P, C).

    Source: DenseCL eq. 4: features of the backbone, not of the head.
    """
    cosines = normalize(places.float(), dim=2) @ normalize(others.float(), dim=2).transpose(1, 2)  # (B, P, P)
    return cosines.argmax(dim=2)
