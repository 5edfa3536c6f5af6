"""Faster R-CNN on a feature pyramid, with mmdetection's defaults and AlignDet's 4conv1fc head.

Source: Ren et al., NIPS 2015; Lin et al., CVPR 2017; mmdetection `faster_rcnn_r50_fpn`, which AlignDet's configs build
on. Code shared with the other R-CNN families is in `parts/two_stage.py`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Detector, Features
from aligndet_cli.detectors.parts.rcnn_config import OneHeadConfig, RCNNConfig
from aligndet_cli.detectors.parts.two_stage import (
    LEVELS,
    build_head,
    build_pyramid_and_rpn,
    detect_boxes,
    find_boxes,
    pretext_candidates,
    train_boxes,
)


class FasterRCNNConfig(OneHeadConfig):
    """Faster R-CNN."""

    family: Literal["faster-rcnn"] = Field("faster-rcnn", description="Detector family.")

    def build(self, backbone: Backbone, num_classes: int) -> "FasterRCNN":
        """Build a Faster R-CNN around `backbone`; everything else has fresh weights."""
        return FasterRCNN(self, backbone, num_classes)


class FasterRCNN(Detector):
    """Proposals, then class scores and a box per class for each of them.

    `forward` returns scalars:
        loss_objectness: cross-entropy of object or not, per sampled anchor.
        loss_rpn_box_reg: L1 distance of predicted and true offsets of positive anchors, per sampled anchor.
        loss_cls: cross-entropy over K classes and background, per sampled RoI.
        loss_box_reg: L1 distance of predicted and true offsets of positive RoIs, per sampled RoI.

    Scores of detections are softmax probabilities.
    """

    levels = LEVELS
    class_modules = ("class_predictor", "box_predictor")
    box_branch = ("rpn", "box_predictor")
    has_objectness = True
    class_predictor: nn.Linear

    def __init__(self, config: FasterRCNNConfig, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone, feature_dim=config.head_features)
        self.config: RCNNConfig = config
        self.neck, self.rpn = build_pyramid_and_rpn(config, backbone)
        self.head, self.class_predictor, self.box_predictor = build_head(config, num_classes, num_classes * 4)

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch; images without boxes are negatives."""
        pyramid = self.neck(self.extract(images).maps)
        losses, _ = train_boxes(self, pyramid, images.sizes_hw, targets)
        return losses

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, best first."""
        return detect_boxes(self, self.neck(self.extract(images).maps), images.sizes_hw)

    @torch.no_grad()
    def find_objects(self, images: ImageBatch) -> list[Detections]:
        """Return the boxes of `parts.two_stage.find_boxes` of each image, best first."""
        return find_boxes(self, self.neck(self.extract(images).maps), images.sizes_hw)

    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Return RoIs that overlap a proposal, see `pretext_candidates`."""
        return pretext_candidates(self, features, proposals, with_losses=with_losses)
