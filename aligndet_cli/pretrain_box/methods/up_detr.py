"""UP-DETR: a DETR that finds random patches of the image that its queries are given.

Source: Dai et al., CVPR 2021, §3, and dddzg/up-detr. In images with a side of 16 pixels or less, which are skipped
there, patches are smaller (docs/differences.md 57).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from aligndet_cli.data.sample import Sample, mix_seed
from aligndet_cli.detectors.detr import DETR
from aligndet_cli.detectors.parts.hungarian import find_matched
from aligndet_cli.errors import ConfigError
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.health import judge_losses
from aligndet_cli.pretrain_box.method import Inputs, Method, Shown, build_seeded_backbone, require_family
from aligndet_cli.pretrain_box.methods.one_view import VIEW, OneView
from aligndet_cli.pretrain_box.methods.patches import NUMBER, build_mlp, cut_patches, embed_patches, variety_of
from aligndet_cli.pretrain_box.pictures import show_views
from aligndet_cli.pretrain_box.views import ViewChanges
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import Recipe

NUM_PATCHES = 10
MIN_SIDE = 8  # of a patch in pixels of the image; the largest leaves as much
DROP_RATE = 0.1  # of patches, query by query
LEVEL = "c5"
CHANGES = ViewChanges(flip=False, colour=False)


class UPDETRViews(OneView):
    """One view of every sample, random patches of it, and the losses of finding them."""

    model: DETR

    def __init__(self, model: DETR, config: PretrainBoxConfig, settings: LoopSettings) -> None:
        super().__init__(model, config, settings, CHANGES)
        width = model.backbone.channels[LEVEL]
        self.patch2query = torch.nn.Linear(width, model.feature_dim)
        self.feature_align = build_mlp(model.feature_dim, width)

    def extra_parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the state dicts of the layers before and behind the transformer, under the official names."""
        return {"patch2query": self.patch2query.state_dict(), "feature_align": self.feature_align.state_dict()}

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scalar losses of B samples, and scalars that are only logged, by name.

        `loss_cls`, `loss_box_reg` and `loss_giou` are those of `DETR.forward` with the patches for boxes, and
        `loss_reconstruction` is the squared distance of the normalised features of the patches and of what the matched
        queries make of them, a mean over these and a sum over the decoder layers.
        """
        samples = [with_patches(sample, self.config.seed) for sample in samples]
        images, targets = self.make_view(samples)
        patches = cut_patches(samples, self.config.seed, self.device)
        features = embed_patches(self.model.backbone, LEVEL, patches)  # (B * P, D)
        num_queries = self.model.config.num_queries
        queries = self._queries(features.view(len(samples), NUM_PATCHES, -1))  # (B, Q, C)
        blocked = other_patches(num_queries, NUM_PATCHES, self.device)
        hidden = self.model.decode(self.model.extract(images), queries, blocked)  # (L, B, Q, C)
        losses, matched = self.model.losses_of(hidden, targets, images.sizes_hw)
        places = find_matched(matched, targets)  # (L * P,) each
        found = normalize(self.feature_align(hidden[places]).float(), dim=1)
        wanted = normalize(features, dim=1)[matched[places]]
        losses["loss_reconstruction"] = reconstruction_loss(found, wanted, num_layers=len(hidden))
        return losses, {"embedding_variety": variety_of(found, wanted)} if self.settings.is_logged(step) else {}

    def _queries(self, features: Tensor) -> Tensor:
        """Return (B, Q, C) queries from the (B, P, D) features of patches; each patch has Q / P queries in a row."""
        embedding = self.model.query_embedding.weight  # (Q, C)
        num_images, num_patches = features.shape[:2]
        of_patches = self.patch2query(features).repeat_interleave(len(embedding) // num_patches, dim=1)  # (B, Q, C)
        if self.training:
            of_patches = of_patches * (torch.rand(num_images, len(embedding), 1, device=features.device) >= DROP_RATE)
        return of_patches + embedding


def with_patches(sample: Sample, seed: int) -> Sample:
    """Return the sample with `NUM_PATCHES` random boxes in place of its own, of whole pixels.

    Sides are drawn evenly from 8 to the image's side minus 8, corners from where the box fits.
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, sample.position, NUMBER))
    draws = torch.rand(2, 2, NUM_PATCHES, generator=generator, dtype=torch.float64)
    corners = []
    for (size, place), side in zip(draws, reversed(sample.size_hw), strict=True):  # x, then y
        low = min(MIN_SIDE, side)
        lengths = low + (size * (max(side - MIN_SIDE, low) - low + 1)).floor()
        starts = (place * (side - lengths + 1)).floor()
        corners.append((starts, starts + lengths))
    (x1, x2), (y1, y2) = corners
    boxes = torch.stack([x1, y1, x2, y2], dim=1).float()  # (P, 4)
    return replace(sample, boxes=boxes, class_ids=torch.zeros(NUM_PATCHES, dtype=torch.int64), masks=None)


def other_patches(num_queries: int, num_patches: int, device: torch.device) -> Tensor:
    """Return a (Q, Q) bool mask, True where two queries are not of the same patch and must not see each other."""
    patch = torch.arange(num_queries, device=device) // (num_queries // num_patches)
    return patch[:, None] != patch


def reconstruction_loss(found: Tensor, wanted: Tensor, *, num_layers: int) -> Tensor:
    """Return the scalar squared distance of (L * P, D) features: a mean over P, a sum over L; 2 - 2 cosine each."""
    return (found - wanted).square().sum() * num_layers / max(len(found), 1)


class UPDETR(Method):
    """Patches as queries; proposals take no part, but only images with some do, as in all methods."""

    idle = ("projector", "temperature", "momentum", "tasks", "objectness", "topk", "limit_boxes", "embedder")

    def check(self, config: PretrainBoxConfig) -> None:
        """Refuse detectors other than DETR, numbers of queries that do not fit, and a backbone that moves."""
        require_family(config, ("detr",))
        super().check(config)
        num_queries = getattr(config.detector, "num_queries", NUM_PATCHES)
        if num_queries % NUM_PATCHES:
            raise ConfigError(
                f"detector.num_queries = {num_queries}: --method up-detr shares them among {NUM_PATCHES} patches; "
                f"give a multiple of {NUM_PATCHES}"
            )
        if not config.freeze_backbone:
            raise ConfigError(
                "--no-freeze-backbone: --method up-detr compares with the features of its backbone; leave it out"
            )

    def build(self, config: PretrainBoxConfig, inputs: Inputs) -> UPDETRViews:
        """Return DETR with one class, "patch"."""
        backbone = build_seeded_backbone(config, inputs.weights)
        model = self.detector_config(config).build(backbone, inputs.num_classes)
        assert isinstance(model, DETR), "check refuses others"
        return UPDETRViews(model, config, inputs.settings)

    def judge(self, metrics: Path) -> dict[str, Any]:
        """Return the verdict on the losses and on the variety of what is reconstructed."""
        return judge_losses(metrics)

    def show(self, config: PretrainBoxConfig, sample: Sample) -> Shown:
        """Return the view with the patches."""
        shown = show_views(with_patches(sample, config.seed), config.views, config.seed, (VIEW,), CHANGES)
        return replace(shown, kind="patches")

    def describe(self, config: PretrainBoxConfig, recipe: Recipe) -> dict[str, str]:
        """Return the patches."""
        return {"patches": f"{NUM_PATCHES} an image, at random; the proposals only choose the images"}
