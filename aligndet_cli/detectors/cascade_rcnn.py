"""Cascade R-CNN and Cascade Mask R-CNN: three heads, each of which refines the boxes of the one before.

Source: Cai and Vasconcelos, CVPR 2018 and TPAMI 2019; mmdetection `cascade_rcnn_r50_fpn` and
`cascade_mask_rcnn_r50_fpn`, with AlignDet's 4conv1fc heads as in its other R-CNNs. Boxes are class-agnostic. The paper
has no such detector; it pre-trains the three heads of its HTC, and here these are pre-trained in the same way.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.detectors.parts.mask_head import MaskBranch, MaskedRCNN, MaskHead, build_mask_predictor
from aligndet_cli.detectors.parts.rcnn_config import CascadeConfig, MaskSettings
from aligndet_cli.detectors.parts.two_stage import RCNN, build_head


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


class CascadeRCNN(RCNN):
    """Proposals, then three times class scores and a box for each of them.

    `forward` returns scalars:
        loss_objectness: cross-entropy of object or not, per sampled anchor.
        loss_rpn_box_reg: smooth L1 distance of predicted and true offsets of positive anchors, per sampled anchor.
        loss_cls: cross-entropy over K classes and background, per sampled RoI, summed over heads with their weights.
        loss_box_reg: smooth L1 distance of predicted and true offsets of positive RoIs, per sampled RoI, likewise.

    Scores of detections are softmax probabilities of the mean logits.
    """

    def __init__(self, config: CascadeRCNNConfig, backbone: Backbone, num_classes: int) -> None:
        super().__init__(config, backbone)
        self.head_weights = config.head_weights
        self.head, self.class_predictor, self.box_predictor = build_heads(config, num_classes)


class CascadeMaskRCNN(MaskedRCNN):
    """Boxes as in Cascade R-CNN, and three mask heads, each trained on the RoIs of a box head.

    `forward` returns the scalars of `CascadeRCNN.forward`, and:
        loss_mask: cross-entropy of the mask of the true class, mean over positive RoIs whose box has a mask, summed
            over heads with their weights.

    Masks of detections are the mean of the three, of the predicted class, and have M = 2 * `mask_pool_size` rows and
    columns.
    """

    class_modules = ("class_predictor", "mask_predictor")

    def __init__(self, config: CascadeMaskRCNNConfig, backbone: Backbone, num_classes: int) -> None:
        super().__init__(config, backbone)
        self.head_weights = config.head_weights
        self.head, self.class_predictor, self.box_predictor = build_heads(config, num_classes)
        self.mask_head = nn.ModuleList(MaskHead(config) for _ in config.head_weights)
        predictors = (build_mask_predictor(config.neck_channels, num_classes) for _ in config.head_weights)
        self.mask_predictor = nn.ModuleList(predictors)

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
