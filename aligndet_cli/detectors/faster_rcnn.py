"""Faster R-CNN on a feature pyramid, with mmdetection's defaults and AlignDet's 4conv1fc head.

Source: Ren et al., NIPS 2015; Lin et al., CVPR 2017; mmdetection `faster_rcnn_r50_fpn`, which AlignDet's configs build
on. Code shared with the other R-CNN families is in `parts/two_stage.py`.
"""

from typing import Literal

from pydantic import Field
from torch import nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.detectors.parts.rcnn_config import OneHeadConfig
from aligndet_cli.detectors.parts.two_stage import RCNN, build_head


class FasterRCNNConfig(OneHeadConfig):
    """Faster R-CNN."""

    family: Literal["faster-rcnn"] = Field("faster-rcnn", description="Detector family.")

    def build(self, backbone: Backbone, num_classes: int) -> "FasterRCNN":
        """Build a Faster R-CNN around `backbone`; everything else has fresh weights."""
        return FasterRCNN(self, backbone, num_classes)


class FasterRCNN(RCNN):
    """Proposals, then class scores and a box per class for each of them.

    `forward` returns scalars:
        loss_objectness: cross-entropy of object or not, per sampled anchor.
        loss_rpn_box_reg: L1 distance of predicted and true offsets of positive anchors, per sampled anchor.
        loss_cls: cross-entropy over K classes and background, per sampled RoI.
        loss_box_reg: L1 distance of predicted and true offsets of positive RoIs, per sampled RoI.

    Scores of detections are softmax probabilities.
    """

    class_modules = ("class_predictor", "box_predictor")
    class_predictor: nn.Linear

    def __init__(self, config: FasterRCNNConfig, backbone: Backbone, num_classes: int) -> None:
        super().__init__(config, backbone)
        self.head, self.class_predictor, self.box_predictor = build_head(config, num_classes, num_classes * 4)
