"""Settings that Faster and Mask R-CNN have in common."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from aligndet_cli.config import Frozen
from aligndet_cli.detectors.parts.anchors import AnchorStyle
from aligndet_cli.detectors.parts.fpn import NeckNorm, NormName, check_group_channels
from aligndet_cli.training.recipe import ProjectorRecipe, Rates, Recipe


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
    neck_norm: NeckNorm = "auto"
    # AlignDet: Shared4Conv1FC; mmdetection's default head has no convolutions and two fully connected layers.
    head_convs: int = Field(4, ge=0, description="Convolutions of the box head.")
    head_fcs: int = Field(1, ge=1, le=2, description="Fully connected layers of the box head.")
    head_features: int = Field(1024, ge=1, description="Width of the fully connected layers.")
    head_norm: NormName = Field("none", description="Norm after the convolutions of the box head.")
    pool_size: int = Field(7, ge=1, description="Rows and columns of a pooled RoI.")
    # The next five differ in torchvision's detectors; import-weights sets them for their weights.
    anchors: AnchorStyle = Field("exact", description="Style of anchors; torchvision's are rounded to whole pixels.")
    rpn_convs: int = Field(1, ge=1, description="Convolutions of the RPN.")
    roi_aligned: bool = Field(True, description="Shift RoIs by half a pixel when pooling.")
    roi_sampling_ratio: int = Field(0, ge=0, description="Samples along a side of a bin; 0: one per cell of the map.")
    min_box_side: float = Field(0.0, ge=0, description="Shortest side of a detection in pixels.")
    rpn_positive_iou: float = Field(0.7, gt=0, le=1, description="IoU with a box from which an anchor is positive.")
    rpn_negative_iou: float = Field(0.3, gt=0, le=1, description="IoU below which an anchor is background.")
    rpn_claim_iou: float = Field(
        0.3, ge=0, le=1, description="Least IoU at which a box takes its best anchor, whatever the limit for positives."
    )
    rpn_samples: int = Field(256, ge=1, description="Anchors of an image in the RPN's loss.")
    rpn_positive_fraction: float = Field(0.5, gt=0, le=1, description="Largest share of positives in the RPN's loss.")
    rpn_nms_iou: float = Field(0.7, ge=0, le=1, description="IoU above which the worse of two RPN boxes is dropped.")
    train_proposals_per_level: int = Field(2000, ge=1, description="Best N RPN boxes per level in training before NMS.")
    test_proposals_per_level: int = Field(1000, ge=1, description="Best N RPN proposals per level at test, before NMS.")
    max_proposals: int = Field(1000, ge=1, description="Best N of the RPN's proposals per image, after NMS.")
    roi_positive_iou: float = Field(0.5, gt=0, le=1, description="IoU with a box from which a RoI is positive.")
    roi_samples: int = Field(512, ge=1, description="RoIs of an image in the head's loss.")
    roi_positive_fraction: float = Field(0.25, gt=0, le=1, description="Largest share of positives in the head's loss.")
    # The authors' selfsup_mask_rcnn_r50_fpn.py.
    pretext_rpn_samples: int = Field(4096, ge=1, description="Anchors of an image in the RPN's loss of pre-training.")
    pretext_roi_samples: int = Field(4096, ge=1, description="Positive RoIs of an image in pre-training.")
    score_threshold: float = Field(0.05, ge=0, le=1, description="Least score of a detection.")
    nms_iou: float = Field(0.5, ge=0, le=1, description="IoU above which the worse of two boxes of a class is dropped.")
    max_detections: int = Field(100, ge=1, description="Best N detections per image.")

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError("rpn_negative_iou must not be above rpn_positive_iou")
        if "group" in (self.neck_norm, self.head_norm):
            check_group_channels(self.neck_channels)
        return self
