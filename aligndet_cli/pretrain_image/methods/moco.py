"""MoCo v2: a view finds the momentum embedding of the other view among embeddings of earlier images."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from aligndet_cli.backbones import Backbone
from aligndet_cli.pretrain_image.method import ImageMethod, Losses, View, embed
from aligndet_cli.processes.collectives import gather_over_ranks
from aligndet_cli.training.embeddings import Contrast, embedding_health


class Queue(nn.Module):
    """The last Q keys of all processes, (Q, D) L2-normalised; random ones at the start."""

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # where the next keys go

    def snapshot(self) -> Tensor:
        """Return a copy: the gradient of a loss needs the queue as it was before the next keys."""
        return self.keys.clone()

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by those (N, D) of each process; of more than Q, the last Q stay."""
        keys = gather_over_ranks(keys)[-len(self.keys) :]
        rows = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[rows] = keys
        self.position.copy_((self.position + len(keys)) % len(self.keys))


class MoCo(ImageMethod):
    """Backbone and head, their momentum copies, and the queue.

    Args:
        backbone: trained in place.
        queue_size: Q, number of embeddings kept.
        temperature: tau of the loss.

    Source: He et al., CVPR 2020, Algorithm 1; Chen et al., MoCo v2: 2-layer head. The official code shuffles the
        batch over GPUs against leaks through batch norm; here GPUs share their statistics (SyncBN).
    """

    def __init__(self, backbone: Backbone, *, embedding_dim: int, queue_size: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.backbone = backbone
        self.head = build_head(backbone.channels["c5"], embedding_dim)
        self.momentum_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        self.queue = Queue(queue_size, embedding_dim)

    def copies(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return the momentum copies."""
        return (self.backbone, self.momentum_backbone), (self.head, self.momentum_head)

    def forward(self, views: Sequence[View], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the loss of two views, (B, 3, S, S) each, and fill the queue; classes are not used."""
        queries = normalize(self.head(embed(self.backbone, views[0].pixels)).float(), dim=1)  # (B, D)
        with torch.no_grad():
            keys = normalize(self.momentum_head(embed(self.momentum_backbone, views[1].pixels)).float(), dim=1)
        with torch.autocast(queries.device.type, enabled=False):
            contrast = moco_loss(queries, keys, self.queue.snapshot(), temperature=self.temperature)
        self.queue.push(keys)
        health = embedding_health(queries.detach()) if with_health else {}
        return {"loss_contrastive": contrast.loss}, contrast.shown() | health


def build_head(in_dim: int, out_dim: int) -> nn.Sequential:
    """Build the head of MoCo v2: two linear layers, the hidden one as wide as the features."""
    return nn.Sequential(nn.Linear(in_dim, in_dim), nn.ReLU(inplace=True), nn.Linear(in_dim, out_dim))


def moco_loss(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float) -> Contrast:
    """Return the InfoNCE loss of each query, with its key as the positive and the queue as negatives.

    Args:
        queries: (N, D) L2-normalised.
        keys: (N, D) L2-normalised, in the order of the queries; constants, like the queue.
        queue: (Q, D) L2-normalised.

    Source: MoCo eq. 1, in the closed form of `contrastive_loss`. As in MoCo, negatives are in the queue only, not in
        the batch.
    """
    positive = (queries * keys.detach()).sum(dim=1) / temperature  # (N,)
    negatives = queries @ queue.T / temperature  # (N, Q)
    loss = softplus(negatives.logsumexp(dim=1) - positive).mean()
    with torch.no_grad():
        return Contrast(
            loss=loss,
            chance=loss.new_tensor(float(len(queue))).log1p(),
            positive_similarity=positive.mean() * temperature,
            negative_similarity=negatives.mean() * temperature,
            accuracy=(positive > negatives.amax(dim=1)).float().mean(),
        )
