"""Faster R-CNN on a feature pyramid, with mmdetection's defaults and AlignDet's 4conv1fc head.

Source: Ren et al., NIPS 2015; Lin et al., CVPR 2017; mmdetection `faster_rcnn_r50_fpn`, which AlignDet's configs build
on. Code shared with Mask R-CNN is in `parts/two_stage.py`.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.config import Frozen
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Features, extract_features
from aligndet_cli.detectors.parts.anchors import AnchorStyle
from aligndet_cli.detectors.parts.fpn import FPN, NormName, check_group_channels
from aligndet_cli.detectors.parts.roi_head import BoxHead, Pooling
from aligndet_cli.detectors.parts.rpn import RPN, RPNRules
from aligndet_cli.detectors.parts.sampling import Sampling
from aligndet_cli.detectors.parts.two_stage import (
    TwoStageRules,
    build_predictors,
    detect_boxes,
    pretext_candidates,
    train_boxes,
)
from aligndet_cli.training.recipe import ProjectorRecipe, Rates, Recipe

LEVELS = ("c2", "c3", "c4", "c5")  # of the backbone; P2..P5 are made of them


class RCNNConfig(Frozen):
    """Settings that Faster and Mask R-CNN have in common; defaults are mmdetection's unless said otherwise."""

    RECIPE: ClassVar[Recipe] = Recipe(
        pretrain=Rates(0.02, 1e-4, "R-CNN pre-training recipe"),
        finetune=Rates(0.03, 5e-5, "R-CNN recipe after pre-training"),
        plain=Rates(0.02, 1e-4, "R-CNN recipe"),
        projector=ProjectorRecipe(hidden_dim=1024),
        topk=70,  # about the number of the paper's proposals (D.1) on a COCO image, see docs/differences.md 5
    )

    neck_channels: int = Field(256, ge=1, description="Width of the feature pyramid.")
    # "auto": the stage decides (AlignDet: none in pre-training, batch in fine-tuning); without a stage it is none.
    neck_norm: Literal["auto", "none", "batch", "group"] = Field(
        "auto", description="Norm in the feature pyramid; auto leaves it to the stage."
    )
    # AlignDet: Shared4Conv1FC; mmdetection's default head has no convolutions and two fully connected layers.
    head_convs: int = Field(4, ge=0, description="Convolutions of the box head.")
    head_fcs: int = Field(1, ge=1, le=2, description="Fully connected layers of the box head.")
    head_features: int = Field(1024, ge=1, description="Width of the fully connected layers.")
    head_norm: NormName = Field("none", description="Norm after the convolutions of the box head.")
    pool_size: int = Field(7, ge=1, description="Rows and columns of a pooled RoI.")
    # The next five differ in torchvision's detectors; import-weights sets them for their weights.
    anchors: AnchorStyle = Field(
        "exact", description="Style of the anchors; torchvision's are rounded to whole pixels."
    )
    rpn_convs: int = Field(1, ge=1, description="Convolutions of the RPN.")
    roi_aligned: bool = Field(True, description="Shift RoIs by half a pixel when pooling.")
    roi_sampling_ratio: int = Field(
        0, ge=0, description="Samples along each side of a bin; 0: one for each cell of the map."
    )
    min_box_side: float = Field(0.0, ge=0, description="Shortest side of a detection in pixels.")
    rpn_positive_iou: float = Field(0.7, gt=0, le=1, description="IoU with a box from which an anchor is positive.")
    rpn_negative_iou: float = Field(0.3, gt=0, le=1, description="IoU below which an anchor is background.")
    rpn_claim_iou: float = Field(
        0.3, ge=0, le=1, description="Least IoU at which a box takes its best anchor, whatever the limit for positives."
    )
    rpn_samples: int = Field(256, ge=1, description="Anchors of an image in the RPN's loss.")
    rpn_positive_fraction: float = Field(
        0.5, gt=0, le=1, description="Largest share of positives among the anchors in the RPN's loss."
    )
    rpn_nms_iou: float = Field(
        0.7, ge=0, le=1, description="IoU above which the worse of two of the RPN's proposals is dropped."
    )
    train_proposals_per_level: int = Field(
        2000, ge=1, description="Best N of the RPN's proposals per level in training, before NMS."
    )
    test_proposals_per_level: int = Field(
        1000, ge=1, description="Best N of the RPN's proposals per level at test, before NMS."
    )
    max_proposals: int = Field(1000, ge=1, description="Best N of the RPN's proposals per image, after NMS.")
    roi_positive_iou: float = Field(0.5, gt=0, le=1, description="IoU with a box from which a RoI is positive.")
    roi_samples: int = Field(512, ge=1, description="RoIs of an image in the head's loss.")
    roi_positive_fraction: float = Field(
        0.25, gt=0, le=1, description="Largest share of positives among the RoIs in the head's loss."
    )
    # The authors' selfsup_mask_rcnn_r50_fpn.py.
    pretext_rpn_samples: int = Field(4096, ge=1, description="Anchors of an image in the RPN's loss of pre-training.")
    pretext_roi_samples: int = Field(4096, ge=1, description="Positive RoIs of an image in pre-training.")
    score_threshold: float = Field(0.05, ge=0, le=1, description="Least score of a detection.")
    nms_iou: float = Field(
        0.5, ge=0, le=1, description="IoU above which the worse of two detections of a class is dropped."
    )
    max_detections: int = Field(100, ge=1, description="Best N detections per image.")

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError("rpn_negative_iou must not be above rpn_positive_iou")
        if "group" in (self.neck_norm, self.head_norm):
            check_group_channels(self.neck_channels)
        return self


class FasterRCNNConfig(RCNNConfig):
    """Faster R-CNN."""

    family: Literal["faster-rcnn"] = Field("faster-rcnn", description="Detector family.")


class BoxParts(NamedTuple):
    """The parts of a two-stage detector that do not depend on the classes."""

    backbone: Backbone
    neck: FPN
    rpn: RPN
    head: BoxHead
    rules: TwoStageRules


class FasterRCNN(nn.Module):
    """A `Detector`: proposals, then class scores and a box per class for each of them.

    `forward` returns scalars:
        loss_objectness: cross-entropy of object or not, per sampled anchor.
        loss_rpn_box_reg: L1 distance of predicted and true offsets of positive anchors, per sampled anchor.
        loss_cls: cross-entropy over K classes and background, per sampled RoI.
        loss_box_reg: L1 distance of predicted and true offsets of positive RoIs, per sampled RoI.

    `detect` returns for each image, best first:
        boxes: (N, 4) xyxy in pixels, N at most `max_detections`.
        scores: (N,) softmax probabilities.
        class_ids: (N,) int64, 0..K-1.

    Args:
        parts: the neck makes P2..P6 of the backbone's c2 to c5, the RPN proposes boxes on all of these, and the head
            classifies and refines them on P2..P5.
        num_classes: K, without background.
    """

    num_slots = 1
    class_modules: tuple[str, ...] = ("class_predictor", "box_predictor")
    fresh_modules: tuple[str, ...] = ()

    def __init__(self, parts: BoxParts, *, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.neck, self.rpn, self.head, self.rules = parts
        self.feature_dim = parts.head.fc.out_features
        self.class_predictor, self.box_predictor = build_predictors(self.feature_dim, num_classes)

    @property
    def class_branch(self) -> list[nn.Module]:
        """No modules: the head serves classes and boxes."""
        return []

    @property
    def box_branch(self) -> list[nn.Module]:
        """Modules that only the box losses train."""
        return [self.rpn, self.box_predictor]

    def extract(self, images: ImageBatch) -> Features:
        """Return maps c2 to c5 of the backbone."""
        return extract_features(self.backbone, images, LEVELS)

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch; images without boxes are negatives."""
        pyramid = self.neck(self.extract(images).maps)
        losses, _ = train_boxes(self, pyramid, images.sizes_hw, targets)
        return losses

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, best first."""
        return detect_boxes(self, self.neck(self.extract(images).maps), images.sizes_hw)

    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Return RoIs that overlap a proposal, see `pretext_candidates`."""
        return pretext_candidates(self, features, proposals, with_losses=with_losses)


def build_faster_rcnn(config: FasterRCNNConfig, backbone: Backbone, num_classes: int) -> FasterRCNN:
    """Build a Faster R-CNN around `backbone`; everything else has fresh weights."""
    return FasterRCNN(build_box_parts(config, backbone), num_classes=num_classes)


def build_box_parts(config: RCNNConfig, backbone: Backbone) -> BoxParts:
    """Build neck, RPN and head around `backbone`, with fresh weights."""
    neck_norm = "none" if config.neck_norm == "auto" else config.neck_norm
    widths = backbone.use_levels(LEVELS)
    channels = config.neck_channels
    rpn_rules = RPNRules(
        positive_iou=config.rpn_positive_iou,
        negative_iou=config.rpn_negative_iou,
        min_claim_iou=config.rpn_claim_iou,
        nms_iou=config.rpn_nms_iou,
        max_proposals=config.max_proposals,
    )
    return BoxParts(
        backbone,
        FPN(widths, channels, neck_norm, extra_levels="pooled"),
        RPN(channels, rpn_rules, num_convs=config.rpn_convs, anchors=config.anchors),
        BoxHead(
            channels,
            config.head_convs,
            config.head_norm,
            pool_size=config.pool_size,
            fc_features=[config.head_features] * config.head_fcs,
        ),
        TwoStageRules(
            rpn_sampling=Sampling(config.rpn_samples, config.rpn_positive_fraction),
            roi_sampling=Sampling(config.roi_samples, config.roi_positive_fraction),
            rpn_pretext=Sampling(config.pretext_rpn_samples, 1.0),
            roi_pretext=Sampling(config.pretext_roi_samples, 1.0),
            train_per_level=config.train_proposals_per_level,
            test_per_level=config.test_proposals_per_level,
            positive_iou=config.roi_positive_iou,
            pooling=Pooling(config.roi_aligned, config.roi_sampling_ratio),
            score_threshold=config.score_threshold,
            min_box_side=config.min_box_side,
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
        ),
    )
