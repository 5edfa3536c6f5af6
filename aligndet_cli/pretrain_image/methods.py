"""Methods that turn views of images into losses for a backbone: SimSiam, MoCo v2, or classes.

Every method has `backbone` and `forward(views, class_ids, *, with_health)`.
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize, softplus

from aligndet_cli.backbones import Backbone
from aligndet_cli.processes.collectives import gather_over_ranks
from aligndet_cli.training.embeddings import Contrast, embedding_health

MethodName = Literal["simsiam", "moco-v2", "supervised"]
Losses = tuple[dict[str, Tensor], dict[str, Tensor]]


class SimSiam(nn.Module):
    """SimSiam: each view predicts the embedding of the other, which gets no gradient.

    Args:
        backbone: trained in place.
        embedding_dim: D of the projector and predictor.
        bottleneck_dim: hidden width of the predictor.

    Source: Chen & He, CVPR 2021, Algorithm 1 and official code: a 3-layer projector as wide as the backbone, batch
        norm in all its layers, the last without scale and shift; a 2-layer predictor.
    """

    def __init__(self, backbone: Backbone, *, embedding_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        width = backbone.channels["c5"]
        self.backbone = backbone
        self.projector = nn.Sequential(
            *_hidden(width, width),
            *_hidden(width, width),
            nn.Linear(width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, affine=False),
        )
        self.predictor = nn.Sequential(
            *_hidden(embedding_dim, bottleneck_dim), nn.Linear(bottleneck_dim, embedding_dim)
        )

    def forward(self, views: Sequence[Tensor], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the loss of two views, (B, 3, H, W) each, -1 at best; classes are not used."""
        first, second = (self.projector(embed(self.backbone, view)) for view in views)  # (B, D)
        loss = simsiam_loss(self.predictor(first), second, self.predictor(second), first)
        return {"loss_similarity": loss}, embedding_health(normalize(first.detach().float())) if with_health else {}


class MoCo(nn.Module):
    """MoCo: a view finds the momentum embedding of the other view among a queue of embeddings of earlier images.

    Args:
        backbone: trained in place.
        queue_size: Q, number of embeddings kept.
        temperature: tau of the loss.

    Source: He et al., CVPR 2020, Algorithm 1; Chen et al., MoCo v2: 2-layer head. The official code shuffles the
        batch over GPUs against leaks through batch norm; here GPUs share their statistics (SyncBN).
    """

    queue: Tensor
    position: Tensor

    def __init__(self, backbone: Backbone, *, embedding_dim: int, queue_size: int, temperature: float) -> None:
        super().__init__()
        width = backbone.channels["c5"]
        self.temperature = temperature
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, embedding_dim))
        self.momentum_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("queue", normalize(torch.randn(queue_size, embedding_dim), dim=1))  # (Q, D)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # where the next embeddings go

    def forward(self, views: Sequence[Tensor], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the loss of two views, (B, 3, H, W) each, and fill the queue; classes are not used."""
        queries = normalize(self.head(embed(self.backbone, views[0])).float(), dim=1)  # (B, D)
        with torch.no_grad():
            keys = normalize(self.momentum_head(embed(self.momentum_backbone, views[1])).float(), dim=1)
        with torch.autocast(queries.device.type, enabled=False):
            # A copy, since the gradient needs the queue as it was before the next keys.
            contrast = moco_loss(queries, keys, self.queue.clone(), temperature=self.temperature)
        self._enqueue(gather_over_ranks(keys))
        health = embedding_health(queries.detach()) if with_health else {}
        return {"loss_contrastive": contrast.loss}, contrast.shown() | health

    @torch.no_grad()
    def update_momentum(self, coefficient: float) -> None:
        """Move the momentum copies towards the trained ones: k = m * k + (1 - m) * q. Parameters only."""
        online: list[Tensor] = [*self.backbone.parameters(), *self.head.parameters()]
        momentum: list[Tensor] = [*self.momentum_backbone.parameters(), *self.momentum_head.parameters()]
        torch._foreach_lerp_(momentum, online, 1.0 - coefficient)

    def _enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys in the queue by (N, D) keys; of more than Q, the last Q stay."""
        keys = keys[-len(self.queue) :]
        rows = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.position.copy_((self.position + len(keys)) % len(self.queue))


class Supervised(nn.Module):
    """Classification of the image by a linear layer on the pooled features."""

    def __init__(self, backbone: Backbone, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.channels["c5"], num_classes)

    def forward(self, views: Sequence[Tensor], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the cross-entropy of one view, (B, 3, H, W), for class ids (B,)."""
        assert class_ids is not None, "prepare asks for classes"
        features = embed(self.backbone, views[0])
        logits = self.fc(features).float()  # (B, K)
        shown = {
            "chance": logits.new_tensor(float(logits.shape[1])).log(),
            "accuracy": (logits.detach().argmax(dim=1) == class_ids).float().mean(),
        }
        if with_health:
            shown |= embedding_health(normalize(features.detach().float(), dim=1))
        return {"loss_cls": cross_entropy(logits, class_ids)}, shown


Method = SimSiam | MoCo | Supervised


def embed(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Return the mean of the last map of the backbone: (B, 3, H, W) -> (B, C)."""
    last: Tensor = backbone(pixels)["c5"]
    return last.mean(dim=(2, 3))


def simsiam_loss(predicted_of_second: Tensor, second: Tensor, predicted_of_first: Tensor, first: Tensor) -> Tensor:
    """Return the negative cosine similarity, a mean over both directions; `first` and `second` get no gradient.

    All are (B, D): the embeddings of each view, and their predictions from the other view.

    Source: SimSiam eqs. 1-2.
    """
    forth = cosine_similarity(predicted_of_second.float(), second.detach().float(), dim=1).mean()
    back = cosine_similarity(predicted_of_first.float(), first.detach().float(), dim=1).mean()
    return -(forth + back) / 2


def moco_loss(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float) -> Contrast:
    """Return the InfoNCE loss of each query, with its key as the positive and the queue as negatives.

    Args:
        queries: (B, D) L2-normalised.
        keys: (B, D) L2-normalised, in the order of the queries; constants, like the queue.
        queue: (Q, D) L2-normalised.

    Source: MoCo eq. 1, in the closed form of `contrastive_loss`. As in MoCo, negatives are in the queue only, not in
        the batch.
    """
    positive = (queries * keys.detach()).sum(dim=1) / temperature  # (B,)
    negatives = queries @ queue.T / temperature  # (B, Q)
    loss = softplus(negatives.logsumexp(dim=1) - positive).mean()
    with torch.no_grad():
        return Contrast(
            loss=loss,
            chance=loss.new_tensor(float(len(queue))).log1p(),
            positive_similarity=positive.mean() * temperature,
            negative_similarity=negatives.mean() * temperature,
            accuracy=(positive > negatives.amax(dim=1)).float().mean(),
        )


def _hidden(in_dim: int, out_dim: int) -> tuple[nn.Module, ...]:
    return nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim), nn.ReLU(inplace=True)
