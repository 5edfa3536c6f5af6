"""Distillation: the backbone tells, through one linear layer, what a frozen teacher makes of the same view."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, normalize

from aligndet_cli.backbones import Backbone
from aligndet_cli.backbones.vit import PlainViT
from aligndet_cli.pretrain_image.method import ImageMethod, Losses, View
from aligndet_cli.training.embeddings import embedding_health


class Distill(ImageMethod):
    """Backbone, linear layer and teacher, compared place by place.

    Dense, since a detector needs to know what is where, which the mean over a view does not tell. It is the student's
    map that is resized, to the teacher's grid: what is to be told stays as the teacher made it. That is its last map,
    of a plain ViT at the stride of its patches.

    Args:
        backbone: trained in place.
        teacher: frozen, in evaluation mode; it normalises images as it was trained with by itself.

    Source: the dense distillation of LightlyTrain (`method="distillation"` from 0.7 on). Theirs has the mean squared
        error of features of two blocks, and mixes images; ours the cosine, which no scale of features decides.
    """

    def __init__(self, backbone: Backbone, teacher: Backbone) -> None:
        super().__init__()
        self.level = "c4" if isinstance(teacher, PlainViT) else "c5"
        teacher.use_levels((self.level,))
        self.backbone, self.teacher = backbone, teacher.requires_grad_(False)
        self.layer = nn.Linear(backbone.channels["c5"], teacher.channels[self.level])
        # It never changes, and is read from its own file again: checkpoints without it are small.
        self.register_state_dict_post_hook(_without_teacher)
        self.register_load_state_dict_post_hook(_allow_no_teacher)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, views: Sequence[View], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return the loss of one view, (B, 3, S, S), 0 at best; classes are not used.

        The chance level is the loss of the best constant. The spread is a share of that of the teacher, to which all
        images may look much alike.
        """
        pixels = views[0].pixels
        with torch.no_grad():
            wanted = self.teacher(pixels)[self.level].float()  # (B, D, h, w)
        told = self.layer(self.backbone(pixels)["c5"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2).float()
        told = interpolate(told, wanted.shape[2:], mode="bilinear")
        shown = {"chance": (1 - normalize(wanted, dim=1).mean(dim=(0, 2, 3)).norm()).clamp(min=1e-6)}
        if with_health:
            shown |= _health(told.detach(), wanted)
        return {"loss_similarity": distill_loss(told, wanted)}, shown


def distill_loss(told: Tensor, wanted: Tensor) -> Tensor:
    """Return the scalar mean of 1 - cosine over all places of features (B, D, h, w)."""
    return (1 - cosine_similarity(told, wanted, dim=1)).mean()


def _health(told: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return the health of what is told of each view, from features (B, D, h, w) of student and teacher."""
    own, goal = (normalize(one.mean(dim=(2, 3)), dim=1) for one in (told, wanted))  # (B, D)
    health = embedding_health(own)
    if len(own) > 1:
        health["embedding_spread"] = own.std(dim=0).mean() / goal.std(dim=0).mean().clamp(min=1e-12)
    return health


_TEACHER = "teacher."


def _without_teacher(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(prefix + _TEACHER)]:
        del state[name]


def _allow_no_teacher(_module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if _TEACHER not in name]
