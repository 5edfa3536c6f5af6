"""Hybrid task cascade: three heads in a row for boxes, and three for masks that pass their features on.

Source: Chen et al., CVPR 2019; mmdetection `htc_without_semantic_r50_fpn`, on which the authors' `selfsup/htc.py` and
the last row of the paper's table 3 build, with AlignDet's 4conv1fc heads and soft NMS. That row has no semantic branch;
the one here is that of mmdetection's `htc_r50_fpn` and of CBNet's released detectors.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.batch import NO_CLASS, BoxTargets
from aligndet_cli.detectors.cascade_rcnn import build_heads
from aligndet_cli.detectors.parts.anchors import SizeHW
from aligndet_cli.detectors.parts.fpn import norm_layer
from aligndet_cli.detectors.parts.mask_head import MaskBranch, MaskedRCNN, MaskHead, build_mask_predictor
from aligndet_cli.detectors.parts.postprocess import NMSType
from aligndet_cli.detectors.parts.rcnn_config import CascadeConfig, MaskSettings
from aligndet_cli.detectors.parts.roi_head import Pyramid, RoiSamples, kaiming_convs
from aligndet_cli.detectors.parts.semantic_head import SemanticHead, semantic_loss
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
    semantic_classes: int = Field(
        0, ge=0, le=NO_CLASS, description="Classes of pixels of a semantic branch, 183 of COCO-stuff (0: no branch)."
    )
    semantic_weight: float = Field(0.2, ge=0, description="Factor on the loss of the semantic branch.")

    def build(self, backbone: Backbone, num_classes: int) -> "HTC":
        """Build an HTC around `backbone`; everything else has fresh weights."""
        return HTC(self, backbone, num_classes)


class HTC(MaskedRCNN):
    """Boxes as in Cascade R-CNN. A mask head learns from what its box head has refined, and sees the mask heads before.

    `forward` returns the scalars of `CascadeMaskRCNN.forward`, and with a semantic branch:
        loss_semantic: cross-entropy of the class of every eighth pixel, mean over those that have one, times a weight.

    Masks of detections are the mean of the three, of the predicted class, and have M = 2 * `mask_pool_size` rows and
    columns.
    """

    class_modules = ("class_predictor", "mask_predictor")
    fresh_modules: tuple[str, ...] = ("mask_head", "mask_flow", "mask_predictor")
    config: HTCConfig

    def __init__(self, config: HTCConfig, backbone: Backbone, num_classes: int) -> None:
        super().__init__(config, backbone)
        self.head_weights = config.head_weights
        self.head, self.class_predictor, self.box_predictor = build_heads(config, num_classes)
        channels, norm = config.neck_channels, norm_layer(config.mask_norm or config.head_norm)
        numbers = range(len(config.head_weights))
        self.mask_head = nn.ModuleList(MaskHead(config) for _ in numbers)
        self.mask_flow = nn.ModuleList(  # from the head before
            Conv2dNormActivation(channels, channels, 1, norm_layer=norm) if number else nn.Identity()
            for number in numbers
        )
        kaiming_convs(self.mask_flow)
        self.mask_predictor = nn.ModuleList(build_mask_predictor(channels, num_classes) for _ in numbers)
        self.semantic_head: SemanticHead | None = None
        if config.semantic_classes:
            self.semantic_head = SemanticHead(channels, config.semantic_classes)
            self.fresh_modules = (*self.fresh_modules, "semantic_head")

    def pyramid(self, maps: dict[str, Tensor]) -> Pyramid:
        """Return P2..P6 from the backbone's maps (B, C, H, W) by level, and what the semantic branch makes of them."""
        levels = self.neck(maps)
        return Pyramid(levels) if self.semantic_head is None else Pyramid(levels, *self.semantic_head(levels))

    def mask_samples(self, boxes: Trained, sizes_hw: Sequence[SizeHW], targets: Sequence[BoxTargets]) -> RoiSamples:
        """Return the RoIs that a mask head learns from: sampled from what the box head beside it has refined."""
        return sample_for(boxes.head, self.config, boxes.refine(sizes_hw), targets)

    def mask_losses(
        self,
        pyramid: Pyramid,
        heads: Sequence[Trained],
        sizes_hw: Sequence[SizeHW],
        targets: Sequence[BoxTargets],
    ) -> dict[str, Tensor]:
        """Return the scalars `loss_mask` and, with a semantic branch, `loss_semantic`."""
        losses = super().mask_losses(pyramid, heads, sizes_hw, targets)
        if pyramid.pixel_logits is not None:
            losses["loss_semantic"] = self.config.semantic_weight * semantic_loss(pyramid.pixel_logits, targets)
        return losses

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
