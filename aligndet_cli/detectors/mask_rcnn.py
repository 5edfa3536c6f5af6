"""Mask R-CNN: Faster R-CNN and a mask for each box.

Source: He et al., ICCV 2017; mmdetection `mask_rcnn_r50_fpn`, which AlignDet's configs build on. Box-domain
pre-training leaves the mask head out (docs/paper.md §4.9), so Faster and Mask R-CNN are pre-trained alike.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.detectors.parts.mask_head import MaskBranch, MaskedRCNN, MaskHead, build_mask_predictor
from aligndet_cli.detectors.parts.rcnn_config import MaskSettings, OneHeadConfig
from aligndet_cli.detectors.parts.two_stage import build_head


class MaskRCNNConfig(MaskSettings, OneHeadConfig):
    """Mask R-CNN: settings of Faster R-CNN, and of the mask head."""

    family: Literal["mask-rcnn"] = Field("mask-rcnn", description="Detector family.")

    def build(self, backbone: Backbone, num_classes: int) -> "MaskRCNN":
        """Build a Mask R-CNN around `backbone`; everything else has fresh weights."""
        return MaskRCNN(self, backbone, num_classes)


class MaskRCNN(MaskedRCNN):
    """Boxes as in Faster R-CNN, then a mask per class for each of them.

    `forward` returns the scalars of `FasterRCNN.forward`, and:
        loss_mask: cross-entropy of the mask of the true class, mean over positive RoIs whose box has a mask.

    Masks of detections are of the predicted class, and have M = 2 * `mask_pool_size` rows and columns.
    """

    class_modules = ("class_predictor", "box_predictor", "mask_predictor")
    class_predictor: nn.Linear

    def __init__(self, config: MaskRCNNConfig, backbone: Backbone, num_classes: int) -> None:
        # The mask head comes first in the draws of initial weights, and late among the parameters.
        mask_head = MaskHead(config)
        super().__init__(config, backbone)
        self.head, self.class_predictor, self.box_predictor = build_head(config, num_classes, num_classes * 4)
        self.mask_head, self.mask_predictor = mask_head, build_mask_predictor(config.neck_channels, num_classes)

    def mask_branches(self) -> list[MaskBranch]:
        """Return the only mask head with its predictor."""
        return [MaskBranch(self.mask_head, self.mask_predictor, self.config, self.mask_head.pool_size)]
