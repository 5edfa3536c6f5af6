"""DETReg: a DETR that finds the proposals, all of one class, and tells what a frozen network makes of each.

Source: Bar et al., CVPR 2022, §3, and amirbar/DETReg. Boxes are the proposals of the workspace, which are filtered, and
not those of a search that is repeated in every epoch; images are resized and flipped, not cropped
(docs/differences.md 57).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligndet_cli.backbones import Backbone, build_backbone, load_backbone_weights
from aligndet_cli.config import NO_WEIGHTS
from aligndet_cli.data.sample import Sample
from aligndet_cli.detectors.detr import DETR
from aligndet_cli.detectors.parts.hungarian import find_matched
from aligndet_cli.errors import ConfigError
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.health import judge_losses
from aligndet_cli.pretrain_box.method import Inputs, Method, Shown, build_seeded_backbone, require_family
from aligndet_cli.pretrain_box.methods.one_view import VIEW, OneView
from aligndet_cli.pretrain_box.methods.patches import build_mlp, cut_patches, embed_patches, variety_of
from aligndet_cli.pretrain_box.pictures import show_views
from aligndet_cli.pretrain_box.views import ViewChanges
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import Recipe

LEVEL = "c3"  # of the embedder: layer2 of a ResNet, the default of the official code ("intermediate")
CHANGES = ViewChanges(colour=False)


class DETRegViews(OneView):
    """One view of every sample, and the losses of DETReg on its proposals.

    Args:
        embedder: frozen; what it makes of a proposal is what the query that finds it must tell.
    """

    model: DETR

    def __init__(self, model: DETR, embedder: Backbone, config: PretrainBoxConfig, settings: LoopSettings) -> None:
        super().__init__(model, config, settings, CHANGES)
        self.embedder = embedder.requires_grad_(False)
        self.feature_embed = build_mlp(model.feature_dim, embedder.channels[LEVEL])
        self.frozen.append(embedder)
        self.train()

    def extra_parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the state dict of the layers that tell the embeddings."""
        return {"feature_embed": self.feature_embed.state_dict()}

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scalar losses of B samples, and scalars that are only logged, by name.

        `loss_cls`, `loss_box_reg` and `loss_giou` are those of `DETR.forward`, and `loss_embedding` is the mean L1
        distance of the embeddings that the queries of the last layer tell of the proposals they are matched to.
        """
        images, targets = self.make_view(samples)
        hidden = self.model.decode(self.model.extract(images))  # (L, B, Q, C)
        losses, matched = self.model.losses_of(hidden, targets, images.sizes_hw)
        embeddings = embed_patches(self.embedder, LEVEL, cut_patches(samples, self.config.seed, self.device))
        places = find_matched(matched[-1:], targets)  # (P,) each
        told = self.feature_embed(hidden[-1:][places]).float()  # (P, D)
        wanted = embeddings[matched[-1:][places]]  # (P, D)
        losses["loss_embedding"] = embedding_loss(told, wanted)
        return losses, _numbers(told, wanted) if self.settings.is_logged(step) else {}


def embedding_loss(told: Tensor, wanted: Tensor) -> Tensor:
    """Return the scalar mean of the L1 distances of (P, D) embeddings; 0 for none."""
    return (told - wanted).abs().sum() / max(told.numel(), 1)


@torch.no_grad()
def _numbers(told: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return the loss of the best constant, and the variety of (P, D) embeddings; empty for none."""
    if not len(told):
        return {}
    constant = wanted.median(dim=0).values.expand_as(wanted)
    return {"embedding_constant": embedding_loss(constant, wanted), "embedding_variety": variety_of(told, wanted)}


class DETReg(Method):
    """Class "object", boxes, and embeddings of a second, frozen backbone."""

    idle = ("projector", "temperature", "momentum", "tasks", "objectness")

    def check(self, config: PretrainBoxConfig) -> None:
        """Refuse detectors other than DETR, and an embedder that has learned nothing."""
        require_family(config, ("detr",))
        super().check(config)
        if config.embedder in ("auto", NO_WEIGHTS):
            raise ConfigError(
                f"embedder = {config.embedder}: may be random, and --method detreg learns from it; name a file of "
                "weights, or leave it out for those of the first backbone"
            )

    def build(self, config: PretrainBoxConfig, inputs: Inputs) -> DETRegViews:
        """Return DETR with one class, and the embedder."""
        backbone = build_seeded_backbone(config, inputs.weights)
        model = self.detector_config(config).build(backbone, inputs.num_classes)
        assert isinstance(model, DETR), "check refuses others"
        embedder = build_backbone(config.backbone)
        embedder.use_levels((LEVEL,))
        load_backbone_weights(embedder, inputs.embedder or inputs.weights)
        return DETRegViews(model, embedder, config, inputs.settings)

    def judge(self, metrics: Path) -> dict[str, Any]:
        """Return the verdict on the losses and on the variety of the embeddings."""
        return judge_losses(metrics)

    def show(self, config: PretrainBoxConfig, sample: Sample) -> Shown:
        """Return the view."""
        return show_views(sample, config.views, config.seed, (VIEW,), CHANGES)

    def describe(self, config: PretrainBoxConfig, recipe: Recipe) -> dict[str, str]:
        """Return the embedder."""
        weights = "the backbone's weights" if config.embedder is None else config.embedder
        return {"embedder": f"{config.backbone.name}, {weights}, mean of {LEVEL}"}
