"""Mask R-CNN: Faster R-CNN and a mask for each box.

Source: He et al., ICCV 2017; mmdetection `mask_rcnn_r50_fpn`, which AlignDet's configs build on. Box-domain
pre-training leaves the mask head out (docs/paper.md §4.9), so Faster and Mask R-CNN are pre-trained alike.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Detector, Features
from aligndet_cli.detectors.parts.mask_head import MaskBranch, MaskHead, add_masks, build_mask_predictor, train_masks
from aligndet_cli.detectors.parts.rcnn_config import MaskSettings, OneHeadConfig, RCNNConfig
from aligndet_cli.detectors.parts.two_stage import (
    LEVELS,
    build_head,
    build_pyramid_and_rpn,
    detect_boxes,
    find_boxes,
    pretext_candidates,
    train_boxes,
)


class MaskRCNNConfig(MaskSettings, OneHeadConfig):
    """Mask R-CNN: settings of Faster R-CNN, and of the mask head."""

    family: Literal["mask-rcnn"] = Field("mask-rcnn", description="Detector family.")

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
        self.neck, self.rpn = build_pyramid_and_rpn(config, backbone)
        self.head, self.class_predictor, self.box_predictor = build_head(config, num_classes, num_classes * 4)
        self.mask_head, self.mask_predictor = mask_head, build_mask_predictor(config.neck_channels, num_classes)

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch with masks; images without boxes are negatives."""
        pyramid = self.neck(self.extract(images).maps)
        losses, [boxes] = train_boxes(self, pyramid, images.sizes_hw, targets)
        [masks] = self.mask_branches()
        return {**losses, "loss_mask": train_masks(masks, pyramid, boxes.samples.positives(), targets)}

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, with masks, best first."""
        pyramid = self.neck(self.extract(images).maps)
        return add_masks(self.mask_branches(), pyramid, detect_boxes(self, pyramid, images.sizes_hw))

    @torch.no_grad()
    def find_objects(self, images: ImageBatch) -> list[Detections]:
        """Return the boxes of `parts.two_stage.find_boxes` of each image, best first."""
        return find_boxes(self, self.neck(self.extract(images).maps), images.sizes_hw)

    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Return RoIs that overlap a proposal, see `pretext_candidates`; masks take no part."""
        return pretext_candidates(self, features, proposals, with_losses=with_losses)

    def mask_branches(self) -> list[MaskBranch]:
        """Return the only mask head with its predictor."""
        return [MaskBranch(self.mask_head, self.mask_predictor, self.config, self.mask_head.pool_size)]
