"""Mask R-CNN: Faster R-CNN and a mask for each box.

Source: He et al., ICCV 2017; mmdetection `mask_rcnn_r50_fpn`, which AlignDet's configs build on. Box-domain
pre-training leaves the mask head out (docs/paper.md §4.9), so both R-CNN families are pre-trained alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Detector, Features
from aligndet_cli.detectors.parts.mask_head import MaskHead, draw_targets, mask_loss, predict_masks
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.detectors.parts.roi_head import RoiSamples, kaiming_convs, pool_rois, to_rois
from aligndet_cli.detectors.parts.two_stage import (
    LEVELS,
    build_box_parts,
    detect_boxes,
    find_boxes,
    pretext_candidates,
    train_boxes,
)
from aligndet_cli.training.recipe import Recipe


class MaskRCNNConfig(RCNNConfig):
    """Mask R-CNN: settings of Faster R-CNN, and of the mask head."""

    RECIPE: ClassVar[Recipe] = replace(RCNNConfig.RECIPE, needs_masks=True)

    family: Literal["mask-rcnn"] = Field("mask-rcnn", description="Detector family.")
    mask_convs: int = Field(4, ge=0, description="Convolutions of the mask head.")
    mask_pool_size: int = Field(14, ge=1, description="Rows and columns of a pooled RoI; its mask has twice as many.")

    def build(self, backbone: Backbone, num_classes: int) -> "MaskRCNN":
        """Build a Mask R-CNN around `backbone`; everything else has fresh weights."""
        return MaskRCNN(self, backbone, num_classes)


class MaskRCNN(Detector):
    """Boxes as in Faster R-CNN, then a mask per class for each of them.

    `forward` returns the scalars of `FasterRCNN.forward`, and:
        loss_mask: cross-entropy of the mask of the true class, mean over positive RoIs whose box has a mask.

    Masks of detections are of the predicted class, and have M = 2 * `mask_pool_size` rows and columns.
    """

    levels = LEVELS
    class_modules = ("class_predictor", "box_predictor", "mask_predictor")
    fresh_modules = ("mask_head", "mask_predictor")
    box_branch = ("rpn", "box_predictor")
    has_objectness = True
    class_predictor: nn.Linear

    def __init__(self, config: MaskRCNNConfig, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone, feature_dim=config.head_features)
        self.config: RCNNConfig = config
        # The mask head comes first in the draws of initial weights, and late among the parameters.
        mask_head = MaskHead(config.neck_channels, config.mask_convs, config.head_norm, config.mask_pool_size)
        parts = build_box_parts(config, backbone, num_classes)
        self.neck, self.rpn, self.head, self.class_predictor, self.box_predictor = parts
        self.mask_head = mask_head
        self.mask_predictor = nn.Conv2d(mask_head.upsample.out_channels, num_classes, 1)
        kaiming_convs(self.mask_predictor)

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch with masks; images without boxes are negatives."""
        pyramid = self.neck(self.extract(images).maps)
        losses, samples = train_boxes(self, pyramid, images.sizes_hw, targets)
        return {**losses, "loss_mask": self.mask_loss(pyramid, samples.positives(), targets)}

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, with masks, best first."""
        pyramid = self.neck(self.extract(images).maps)
        found = detect_boxes(self, pyramid, images.sizes_hw)
        rois = to_rois([of_image.boxes for of_image in found])
        logits = self.mask_logits(pyramid, rois, torch.cat([of_image.class_ids for of_image in found]))
        masks = logits.sigmoid().split([len(of_image.boxes) for of_image in found])
        return [replace(of_image, masks=of_masks) for of_image, of_masks in zip(found, masks, strict=True)]

    @torch.no_grad()
    def find_objects(self, images: ImageBatch) -> list[Detections]:
        """Return the boxes of `parts.two_stage.find_boxes` of each image, best first."""
        return find_boxes(self, self.neck(self.extract(images).maps), images.sizes_hw)

    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Return RoIs that overlap a proposal, see `pretext_candidates`; masks take no part."""
        return pretext_candidates(self, features, proposals, with_losses=with_losses)

    def mask_logits(self, pyramid: list[Tensor], rois: Tensor, class_ids: Tensor) -> Tensor:
        """Return (S, M, M) logits of the mask of the class (S,) of each RoI (S, 5)."""
        pooled, row = pool_rois(pyramid, rois, self.mask_head.pool_size, self.config)
        by_level = torch.empty_like(class_ids).index_put((row,), class_ids)
        return predict_masks(self.mask_predictor, self.mask_head(pooled), by_level)[row]

    def mask_loss(self, pyramid: list[Tensor], positives: RoiSamples, targets: Sequence[BoxTargets]) -> Tensor:
        """Return the scalar `loss_mask` of the positive RoIs on P2..P5, (B, C, H, W) each."""
        pairs = zip(positives.matched, targets, strict=True)
        class_ids = torch.cat([of_image.class_ids[matched] for matched, of_image in pairs])
        logits = self.mask_logits(pyramid, positives.rois(), class_ids)
        return mask_loss(logits, *draw_targets(positives, targets, logits.shape[-1]))
