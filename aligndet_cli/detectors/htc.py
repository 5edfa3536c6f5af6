"""Hybrid task cascade: three heads in a row for boxes, and three for masks that pass their features on.

Source: Chen et al., CVPR 2019; mmdetection `htc_without_semantic_r50_fpn`, on which the authors' `selfsup/htc.py` and
the last row of the paper's table 3 build, with AlignDet's 4conv1fc heads and soft NMS. There is no semantic branch, as
in that row.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.cascade_rcnn import build_heads
from aligndet_cli.detectors.parts.anchors import SizeHW
from aligndet_cli.detectors.parts.fpn import norm_layer
from aligndet_cli.detectors.parts.mask_head import MaskBranch, MaskedRCNN, MaskHead, build_mask_predictor
from aligndet_cli.detectors.parts.postprocess import NMSType
from aligndet_cli.detectors.parts.rcnn_config import CascadeConfig, MaskSettings
from aligndet_cli.detectors.parts.roi_head import RoiSamples, kaiming_convs
from aligndet_cli.detectors.parts.two_stage import Trained, sample_for


class HTCConfig(MaskSettings, CascadeConfig):
    """Hybrid task cascade: settings of Cascade Mask R-CNN; some defaults differ."""

    HEADS_CLAIM: ClassVar[bool] = True

    family: Literal["htc"] = Field("htc", description="Detector family.")
    score_threshold: float = Field(0.001, ge=0, le=1, description="Least score of a detection.")
    # the authors' cbnetv2_swin-L_8x2_1x_coco.py
    nms_type: NMSType = Field(
        "soft_nms", description="Drop boxes that overlap a better one, or lower their scores (soft)."
    )

    def build(self, backbone: Backbone, num_classes: int) -> "HTC":
        """Build an HTC around `backbone`; everything else has fresh weights."""
        return HTC(self, backbone, num_classes)


class HTC(MaskedRCNN):
    """Boxes as in Cascade R-CNN. A mask head learns from what its box head has refined, and sees the mask heads before.

    `forward` returns the scalars of `CascadeMaskRCNN.forward`.

    Masks of detections are the mean of the three, of the predicted class, and have M = 2 * `mask_pool_size` rows and
    columns.
    """

    class_modules = ("class_predictor", "mask_predictor")
    fresh_modules = ("mask_head", "mask_flow", "mask_predictor")

    def __init__(self, config: HTCConfig, backbone: Backbone, num_classes: int) -> None:
        super().__init__(config, backbone)
        self.head_weights = config.head_weights
        self.head, self.class_predictor, self.box_predictor = build_heads(config, num_classes)
        channels, norm, numbers = config.neck_channels, config.head_norm, range(len(config.head_weights))
        settings = channels, config.mask_convs, norm, config.mask_pool_size
        self.mask_head = nn.ModuleList(MaskHead(*settings) for _ in numbers)
        self.mask_flow = nn.ModuleList(  # from the head before
            Conv2dNormActivation(channels, channels, 1, norm_layer=norm_layer(norm)) if number else nn.Identity()
            for number in numbers
        )
        kaiming_convs(self.mask_flow)
        self.mask_predictor = nn.ModuleList(build_mask_predictor(channels, num_classes) for _ in numbers)

    def mask_samples(self, boxes: Trained, sizes_hw: Sequence[SizeHW], targets: Sequence[BoxTargets]) -> RoiSamples:
        """Return the RoIs that a mask head learns from: sampled from what the box head beside it has refined."""
        return sample_for(boxes.head, self.config, boxes.refine(sizes_hw), targets)

    def mask_branches(self) -> list[MaskBranch]:
        """Return the mask heads, each with those before it, and their predictors, first one first."""
        branches = []
        for number, (head, predictor) in enumerate(zip(self.mask_head, self.mask_predictor, strict=True)):
            assert isinstance(head, MaskHead) and isinstance(predictor, nn.Conv2d)
            branches.append(MaskBranch(partial(self._mask_features, number), predictor, self.config, head.pool_size))
        return branches

    def _mask_features(self, number: int, pooled: Tensor) -> Tensor:
        """Return the (S, C, 2 * size, 2 * size) features of a mask head from (S, C, size, size) pooled RoIs.

        Each head before it adds what it makes of the same RoIs to the input of the next one.
        """
        hidden = pooled
        for index, before in enumerate(self.mask_head[:number]):
            assert isinstance(before, MaskHead)
            hidden = pooled + self.mask_flow[index + 1](before.convs(hidden))
        features: Tensor = self.mask_head[number](hidden)
        return features
