"""Cascade R-CNN and Cascade Mask R-CNN: three heads, each of which refines the boxes of the one before.

Source: Cai and Vasconcelos, CVPR 2018 and TPAMI 2019; mmdetection `cascade_rcnn_r50_fpn` and
`cascade_mask_rcnn_r50_fpn`, with AlignDet's 4conv1fc heads as in its other R-CNNs. Boxes are class-agnostic. The paper
has no such detector; it pre-trains the three heads of its HTC, and here these are pre-trained in the same way.
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
from aligndet_cli.detectors.parts.rcnn_config import CascadeConfig, MaskSettings, RCNNConfig
from aligndet_cli.detectors.parts.two_stage import (
    LEVELS,
    build_head,
    build_pyramid_and_rpn,
    detect_boxes,
    find_boxes,
    pretext_candidates,
    total,
    train_boxes,
)


class CascadeRCNNConfig(CascadeConfig):
    """Cascade R-CNN."""

    family: Literal["cascade-rcnn"] = Field("cascade-rcnn", description="Detector family.")

    def build(self, backbone: Backbone, num_classes: int) -> "CascadeRCNN":
        """Build a Cascade R-CNN around `backbone`; everything else has fresh weights."""
        return CascadeRCNN(self, backbone, num_classes)


class CascadeMaskRCNNConfig(MaskSettings, CascadeConfig):
    """Cascade Mask R-CNN: settings of Cascade R-CNN, and of the mask heads."""

    family: Literal["cascade-mask-rcnn"] = Field("cascade-mask-rcnn", description="Detector family.")

    def build(self, backbone: Backbone, num_classes: int) -> "CascadeMaskRCNN":
        """Build a Cascade Mask R-CNN around `backbone`; everything else has fresh weights."""
        return CascadeMaskRCNN(self, backbone, num_classes)


class CascadeRCNN(Detector):
    """Proposals, then three times class scores and a box for each of them.

    `forward` returns scalars:
        loss_objectness: cross-entropy of object or not, per sampled anchor.
        loss_rpn_box_reg: smooth L1 distance of predicted and true offsets of positive anchors, per sampled anchor.
        loss_cls: cross-entropy over K classes and background, per sampled RoI, summed over heads with their weights.
        loss_box_reg: smooth L1 distance of predicted and true offsets of positive RoIs, per sampled RoI, likewise.

    Scores of detections are softmax probabilities of the mean logits.
    """

    levels = LEVELS
    box_branch = ("rpn", "box_predictor")
    has_objectness = True

    def __init__(self, config: CascadeRCNNConfig, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone, feature_dim=config.head_features)
        self.config: RCNNConfig = config
        self.head_weights = config.head_weights
        self.neck, self.rpn = build_pyramid_and_rpn(config, backbone)
        self.head, self.class_predictor, self.box_predictor = build_heads(config, num_classes)

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch; images without boxes are negatives."""
        losses, _ = train_boxes(self, self.neck(self.extract(images).maps), images.sizes_hw, targets)
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
        """Return RoIs of each head, and background, see `pretext_candidates`."""
        return pretext_candidates(self, features, proposals, with_losses=with_losses)


class CascadeMaskRCNN(Detector):
    """Boxes as in Cascade R-CNN, and three mask heads, each trained on the RoIs of a box head.

    `forward` returns the scalars of `CascadeRCNN.forward`, and:
        loss_mask: cross-entropy of the mask of the true class, mean over positive RoIs whose box has a mask, summed
            over heads with their weights.

    Masks of detections are the mean of the three, of the predicted class, and have M = 2 * `mask_pool_size` rows and
    columns.
    """

    levels = LEVELS
    class_modules = ("class_predictor", "mask_predictor")
    fresh_modules = ("mask_head", "mask_predictor")
    box_branch = ("rpn", "box_predictor")
    has_objectness = True

    def __init__(self, config: CascadeMaskRCNNConfig, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone, feature_dim=config.head_features)
        self.config: RCNNConfig = config
        self.head_weights = config.head_weights
        self.neck, self.rpn = build_pyramid_and_rpn(config, backbone)
        self.head, self.class_predictor, self.box_predictor = build_heads(config, num_classes)
        settings = config.neck_channels, config.mask_convs, config.head_norm, config.mask_pool_size
        self.mask_head = nn.ModuleList(MaskHead(*settings) for _ in config.head_weights)
        predictors = (build_mask_predictor(config.neck_channels, num_classes) for _ in config.head_weights)
        self.mask_predictor = nn.ModuleList(predictors)

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch with masks; images without boxes are negatives."""
        pyramid = self.neck(self.extract(images).maps)
        losses, trained = train_boxes(self, pyramid, images.sizes_hw, targets)
        masks = [
            boxes.head.rules.weight * train_masks(branch, pyramid, boxes.samples.positives(), targets)
            for branch, boxes in zip(self.mask_branches(), trained, strict=True)
        ]
        return {**losses, "loss_mask": total(masks)}

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
        """Return RoIs of each head, and background, see `pretext_candidates`; masks take no part."""
        return pretext_candidates(self, features, proposals, with_losses=with_losses)

    def mask_branches(self) -> list[MaskBranch]:
        """Return the mask heads with their predictors, first one first."""
        branches = []
        for head, predictor in zip(self.mask_head, self.mask_predictor, strict=True):
            assert isinstance(head, MaskHead) and isinstance(predictor, nn.Conv2d)
            branches.append(MaskBranch(head, predictor, self.config, head.pool_size))
        return branches


def build_heads(config: CascadeConfig, num_classes: int) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleList]:
    """Build the heads, class predictors and class-agnostic box predictors of a cascade with fresh weights."""
    heads, classes, boxes = zip(*(build_head(config, num_classes, 4) for _ in config.head_weights), strict=True)
    return nn.ModuleList(heads), nn.ModuleList(classes), nn.ModuleList(boxes)
