"""Settings that the R-CNN families have in common, and the rules that follow from them for training their heads."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from aligndet_cli.config import Frozen
from aligndet_cli.detectors.parts.anchors import AnchorStyle
from aligndet_cli.detectors.parts.fpn import NeckNorm, NormName, check_group_channels
from aligndet_cli.detectors.parts.postprocess import NMSType
from aligndet_cli.detectors.parts.sampling import Sampling
from aligndet_cli.training.recipe import ProjectorRecipe, Rates, Recipe

# RoIs are close to their boxes: units of dx, dy, dw, dh, smaller from head to head of a cascade.
DELTA_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
Share = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class HeadRules:
    """Rules by which a box head is trained, and the meaning of its offsets.

    Attributes:
        positive_iou: IoU with a box from which a RoI is positive.
        delta_std: units of dx, dy, dw, dh.
        weight: factor on its losses.
        box_beta: distance of offsets, in these units, below which their loss is squared; 0 is L1.
        claims: a box gets its best RoI, from `positive_iou` on, even if that overlaps another box more.
    """

    positive_iou: float
    delta_std: tuple[float, float, float, float]
    weight: float
    box_beta: float
    claims: bool


@dataclass(frozen=True)
class PretextSampling:
    """Numbers of what pre-training samples from an image.

    Attributes:
        anchors: for the RPN's losses.
        rois: for each head.
        only_positives: no background among the RoIs.
    """

    anchors: Sampling
    rois: Sampling
    only_positives: bool


class RCNNConfig(Frozen):
    """Settings that the R-CNN families have in common; defaults are mmdetection's unless said otherwise.

    Attributes:
        RPN_BOX_BETA: distance of offsets below which the RPN's box loss is squared; 0 is L1.
        ANCHORS_INSIDE: the RPN is not trained on anchors that cross the border of the image.
    """

    RPN_BOX_BETA: ClassVar[float] = 0.0
    ANCHORS_INSIDE: ClassVar[bool] = False

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
    roi_samples: int = Field(512, ge=1, description="RoIs of an image in the head's loss.")
    roi_positive_fraction: float = Field(0.25, gt=0, le=1, description="Largest share of positives in the head's loss.")
    score_threshold: float = Field(0.05, ge=0, le=1, description="Least score of a detection.")
    nms_iou: float = Field(0.5, ge=0, le=1, description="IoU above which the worse of two boxes of a class is dropped.")
    nms_type: NMSType = Field("nms", description="Drop boxes that overlap a better one, or lower their scores (soft).")
    max_detections: int = Field(100, ge=1, description="Best N detections per image.")

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ValueError("rpn_negative_iou must not be above rpn_positive_iou")
        if "group" in (self.neck_norm, self.head_norm):
            check_group_channels(self.neck_channels)
        return self

    @property
    def train_proposals(self) -> int:
        """Best proposals of an image in training, after NMS."""
        return self.max_proposals

    def sampling(self) -> tuple[Sampling, Sampling]:
        """Return what fine-tuning samples from an image: anchors, and RoIs for each head."""
        anchors = Sampling(self.rpn_samples, self.rpn_positive_fraction)
        return anchors, Sampling(self.roi_samples, self.roi_positive_fraction)

    def head_rules(self) -> tuple[HeadRules, ...]:
        """Return the rules of each head, first one first."""
        raise NotImplementedError

    def pretext_sampling(self) -> PretextSampling:
        """Return what pre-training samples from an image."""
        raise NotImplementedError


class OneHeadConfig(RCNNConfig):
    """Settings of the families with one head, Faster and Mask R-CNN."""

    roi_positive_iou: float = Field(0.5, gt=0, le=1, description="IoU with a box from which a RoI is positive.")
    # The authors' selfsup_mask_rcnn_r50_fpn.py.
    pretext_rpn_samples: int = Field(4096, ge=1, description="Anchors of an image in the RPN's loss of pre-training.")
    pretext_roi_samples: int = Field(4096, ge=1, description="Positive RoIs of an image in pre-training.")

    def head_rules(self) -> tuple[HeadRules, ...]:
        """Return the rules of the only head."""
        return (HeadRules(self.roi_positive_iou, DELTA_STDS[0], weight=1.0, box_beta=0.0, claims=True),)

    def pretext_sampling(self) -> PretextSampling:
        """Return what pre-training samples from an image: positives first, and no RoIs of background."""
        return PretextSampling(
            Sampling(self.pretext_rpn_samples, 1.0), Sampling(self.pretext_roi_samples, 1.0), only_positives=True
        )


class CascadeConfig(RCNNConfig):
    """Settings of the families with three heads; defaults are those of mmdetection's `cascade_rcnn_r50_fpn`.

    Attributes:
        HEADS_CLAIM: see `HeadRules.claims`.
    """

    RPN_BOX_BETA: ClassVar[float] = 1 / 9
    ANCHORS_INSIDE: ClassVar[bool] = True
    HEADS_CLAIM: ClassVar[bool] = False

    train_max_proposals: int = Field(2000, ge=1, description="Best N of the RPN's proposals per image in training.")
    head_positive_ious: tuple[Share, Share, Share] = Field(
        (0.5, 0.6, 0.7), description="IoU with a box from which a RoI is positive, by head."
    )
    head_weights: tuple[Weight, Weight, Weight] = Field(
        (1.0, 0.5, 0.25), description="Factor on the losses of each head."
    )

    @field_validator("head_weights")
    @classmethod
    def _check_weights(cls, weights: tuple[float, float, float]) -> tuple[float, float, float]:
        if not any(weights):
            raise ValueError("one should be above 0, or no head is trained")
        return weights

    @property
    def train_proposals(self) -> int:
        """Best proposals of an image in training, after NMS."""
        return self.train_max_proposals

    def head_rules(self) -> tuple[HeadRules, ...]:
        """Return the rules of each head, first one first."""
        return tuple(
            HeadRules(positive_iou, delta_std, weight, box_beta=1.0, claims=self.HEADS_CLAIM)
            for positive_iou, delta_std, weight in zip(
                self.head_positive_ious, DELTA_STDS, self.head_weights, strict=True
            )
        )

    def pretext_sampling(self) -> PretextSampling:
        """Return what pre-training samples from an image: as fine-tuning does, with background.

        Source: the authors' `selfsup/htc.py` and `selfsup/cbv2.py`.
        """
        return PretextSampling(*self.sampling(), only_positives=False)


class MaskSettings(RCNNConfig):
    """Settings of the mask head, for the families that have one."""

    RECIPE: ClassVar[Recipe] = replace(RCNNConfig.RECIPE, needs_masks=True)

    mask_convs: int = Field(4, ge=0, description="Convolutions of the mask head.")
    # CBNet's released detectors have norms in the box heads alone.
    mask_norm: NormName | None = Field(None, description="Norm after the convolutions of the mask head (head_norm).")
    mask_pool_size: int = Field(14, ge=1, description="Rows and columns of a pooled RoI; its mask has twice as many.")

    @model_validator(mode="after")
    def _check_mask_norm(self) -> Self:
        if self.mask_norm == "group":
            check_group_channels(self.neck_channels)
        return self
