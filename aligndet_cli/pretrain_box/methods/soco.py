"""SoCo: what backbone, pyramid and box head make of a box in one view predicts a momentum copy's in another.

Source: Wei et al., NeurIPS 2021, §3, and hologerry/SoCo. There every box is pooled from all levels, and pairs on other
levels than those of the boxes do not count; here a box is pooled once, from its own level (docs/differences.md 57).
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from aligndet_cli.backbones import WeightsTraining
from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.sides import fold_sides
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.parts.roi_head import pool_rois
from aligndet_cli.detectors.parts.two_stage import RCNN
from aligndet_cli.errors import ConfigError
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.health import judge_similarity
from aligndet_cli.pretrain_box.method import (
    Inputs,
    Method,
    Pretext,
    Shown,
    ShownView,
    build_seeded_backbone,
    require_family,
)
from aligndet_cli.pretrain_box.methods.soco_views import PlacedView, draw_three_views, level_of_sides, place_boxes
from aligndet_cli.pretrain_box.recipes import SOCO_PROJECTOR
from aligndet_cli.training.embeddings import embedding_health
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.projector import build_projector, follow
from aligndet_cli.training.recipe import ProjectorRecipe, Recipe
from aligndet_cli.training.schedules import momentum_at

UNTRAINED = ("class_predictor", *RCNN.box_branch)
FAMILIES = ("faster-rcnn", "mask-rcnn")  # with one head


class SoCoViews(Pretext):
    """Three views of every sample, both networks, and the losses of two pairs of views in both directions.

    Args:
        model: trained in place, the backbone included.
        projector: widths of the projector and the predictor.
        embedding_dim: D.
        config: its views, seed and momentum are used.
        settings: its `is_logged` and length are used.
    """

    def __init__(
        self, model: RCNN, projector: ProjectorRecipe, config: PretrainBoxConfig, settings: LoopSettings
    ) -> None:
        super().__init__()
        [side] = config.views.short_side
        self.side, self.config, self.settings, self.largest_hw = side, config, settings, (side, side)
        for name in (*UNTRAINED, *model.fresh_modules):
            model.get_submodule(name).requires_grad_(False)
        dim = config.projector.embedding_dim
        self.model = model
        self.projector = build_projector(model.feature_dim, projector.hidden_dim, dim)
        self.predictor = build_projector(dim, projector.hidden_dim, dim)
        self.momentum = copy.deepcopy(model).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @property
    def detector(self) -> Detector:
        """The online detector."""
        return self.model

    @property
    def left_out(self) -> Sequence[str]:
        """The modules that no loss reaches."""
        return UNTRAINED

    def extra_parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the state dicts of projector and predictor."""
        return {"projector": self.projector.state_dict(), "predictor": self.predictor.state_dict()}

    def compiled_parts(self) -> Sequence[nn.Module]:
        """Return both detectors."""
        return self.model, self.momentum

    def forward(self, samples: Sequence[Sample], step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the scalar loss of B samples, -8 at best, and numbers of the embeddings that are only logged."""
        device = next(self.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            views = draw_three_views(samples, self.side, self.config.seed, device)
            wanted = [_encode(self.momentum, self.momentum_projector, view) for view in views]  # (B, n, D) each
        projected = [_encode(self.model, self.projector, view) for view in views]
        predicted = [self.predictor(one.flatten(0, 1)).view_as(one) for one in projected]
        with torch.autocast(device.type, enabled=False):
            losses = [
                similarity_loss(one, other, ids, other_ids)
                for side, opposite in ((predicted, wanted), (wanted, predicted))
                for one, other, ids, other_ids in _pairs(side, opposite, [view.ids for view in views])
            ]
        health = {}
        if self.settings.is_logged(step):
            health = embedding_health(normalize(projected[0].detach().flatten(0, 1).float(), dim=1))
        return {"loss_similarity": torch.stack(losses).sum()}, health

    def after_step(self, step: int) -> None:
        """Move the momentum parameters towards the online ones, see `follow`.

        The official code does so before the momentum side of the next step, which is the same.
        """
        coefficient = momentum_at(step, self.settings.schedule.num_steps, self.config.momentum)
        follow([(self.model, self.momentum), (self.projector, self.momentum_projector)], coefficient)


def _pairs(
    ones: Sequence[Tensor], others: Sequence[Tensor], ids: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return embeddings (B, K, D) and ids (B, K) of views 1 and 2, and of views 1 and 3.

    The first view has the K boxes of the first pair, then those of the second.
    """
    found = []
    for number in (1, 2):
        count = ids[number].shape[1]
        own = slice((number - 1) * count, number * count)
        found.append((ones[0][:, own], others[number], ids[0][:, own], ids[number]))
    return found


def similarity_loss(ones: Tensor, others: Tensor, ids: Tensor, other_ids: Tensor) -> Tensor:
    """Return the scalar -2 times the mean cosine of the pairs of boxes of equal id in an image; the mean over images.

    Args:
        ones: (B, K, D) embeddings in a view.
        others: (B, K, D) in the other view.
        ids, other_ids: (B, K) int64; ids of places without a box differ between the views.
    """
    cosines = normalize(ones.float(), dim=2) @ normalize(others.float(), dim=2).transpose(1, 2)  # (B, K, K)
    same = ids[:, :, None] == other_ids[:, None, :]
    return (-2 * (cosines * same).sum(dim=(1, 2)) / (same.sum(dim=(1, 2)) + 1e-6)).mean()


def _encode(model: RCNN, projector: nn.Module, view: PlacedView) -> Tensor:
    """Return the (B, n, D) embeddings of the boxes of a view."""
    num_images, num_boxes = view.ids.shape
    sizes_hw = ((view.pixels.shape[2], view.pixels.shape[3]),) * num_images
    pyramid = model.neck(model.extract(ImageBatch(view.pixels, sizes_hw)).maps)
    pooled, row = pool_rois(pyramid, view.rois, model.config.pool_size, model.config, level_of_sides(view.rois))
    embeddings: Tensor = projector(model.head(pooled)[row])
    return embeddings.view(num_images, num_boxes, -1)


class SoCo(Method):
    """BYOL on boxes, through backbone, pyramid and head, all with batch norm."""

    idle = ("temperature", "tasks", "objectness", "embedder", "projector.start", "views.long_side")
    trains_norms = True

    def check(self, config: PretrainBoxConfig) -> None:
        """Refuse detectors without one box head, a frozen backbone, and views that are no squares of one size."""
        require_family(config, FAMILIES)
        if config.freeze_backbone:
            raise ConfigError("--freeze-backbone: --method soco trains the backbone; leave it out")
        sides = config.views.short_side
        if len(sides) > 1 or sides[0] < 64 or sides[0] % 2:
            raise ConfigError(
                f"--short-side {','.join(map(str, fold_sides(sides)))}: --method soco has square views of one side and "
                "of half of it; give one even number from 64 on"
            )
        super().check(config)

    def build(self, config: PretrainBoxConfig, inputs: Inputs) -> SoCoViews:
        """Return both networks."""
        backbone = build_seeded_backbone(config, inputs.weights, fixes_norms=False)
        model = self.detector_config(config).build(backbone, inputs.num_classes)
        assert isinstance(model, RCNN), "check refuses others"
        return SoCoViews(model, config.projector.resolve(SOCO_PROJECTOR), config, inputs.settings)

    def judge(self, metrics: Path) -> dict[str, Any]:
        """Return the verdict on the loss and on the embeddings."""
        return judge_similarity(metrics, best=-8.0)

    def show(self, config: PretrainBoxConfig, sample: Sample) -> Shown:
        """Return the three views, with the proposals as far as these are in them."""
        [side] = config.views.short_side
        views = []
        for view in draw_three_views([sample], side, config.seed, torch.device("cpu")):
            [params], size = view.params, view.pixels.shape[-1]
            placed = place_boxes(sample.boxes, params, size)
            views.append(ShownView(view.pixels[0], placed, f"{size}x{size}{', flipped' if params.flip else ''}"))
        return Shown(sample.boxes, views)

    def backbone_training(self, before: WeightsTraining) -> WeightsTraining:
        """Return the training of the backbone afterwards."""
        return WeightsTraining("SoCo")

    def describe(self, config: PretrainBoxConfig, recipe: Recipe) -> dict[str, str]:
        """Return the widths of projector and predictor, and the sizes of the views."""
        projector, [side] = config.projector.resolve(recipe.projector), config.views.short_side
        return {
            "projector": f"{projector.hidden_dim} and {config.projector.embedding_dim} wide, and a predictor like it",
            "views": f"two of {side} x {side}, the first of the whole image, and one of {side // 2} x {side // 2}",
        }
