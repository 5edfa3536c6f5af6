"""RetinaNet from torchvision's parts with mmdetection's defaults.

Source: Lin et al., ICCV 2017; mmdetection `retinanet_r50_fpn`, which AlignDet's configs build on.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from aligndet_cli.backbones import Backbone
from aligndet_cli.config import Frozen
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Detector, Features, weigh_assistant
from aligndet_cli.detectors.parts.anchors import AnchorGrid, AnchorStyle, SizeHW
from aligndet_cli.detectors.parts.box_coder import decode_boxes, encode_boxes
from aligndet_cli.detectors.parts.cells import gather_cells, gather_slots, grids_of, image_index_of
from aligndet_cli.detectors.parts.dense_head import initialise_head, select_scores, sum_focal_loss
from aligndet_cli.detectors.parts.fpn import FPN, ConvExtraName, NeckNorm, NormName, check_group_channels, conv_tower
from aligndet_cli.detectors.parts.matching import class_ids_of, instance_ids_of, matched_boxes
from aligndet_cli.detectors.parts.postprocess import select_detections
from aligndet_cli.detectors.parts.sampling import places_in_rows, sample_each_image
from aligndet_cli.training.recipe import Rates, Recipe

STRIDES = (8, 16, 32, 64, 128)  # P3..P7
SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))  # anchor sides 4, 5.04 and 6.35 strides
RATIOS = (0.5, 1.0, 2.0)


class RetinaNetConfig(Frozen):
    """RetinaNet; defaults are mmdetection's unless said otherwise."""

    RECIPE: ClassVar[Recipe] = Recipe(
        pretrain=Rates(0.01, 1e-4, "RetinaNet pre-training recipe"),
        finetune=Rates(0.015, 5e-5, "RetinaNet recipe after pre-training"),
        plain=Rates(0.01, 1e-4, "RetinaNet recipe"),
        topk=50,  # the authors' selfsup/retinanet.py, SelectTopKProposals
    )

    family: Literal["retinanet"] = Field("retinanet", description="Detector family.")
    neck_channels: int = Field(256, ge=1, description="Width of the feature pyramid.")
    head_convs: int = Field(4, ge=0, description="Convolutions of each branch of the head.")
    neck_norm: NeckNorm = "auto"
    head_norm: NormName = Field("none", description="Norm after the convolutions of the head.")
    # The next three differ in torchvision's and detectron2's detectors; import-weights sets them for their weights.
    extra_levels: ConvExtraName = Field("from_c5", description="Origin of the pyramid's levels P6 and P7.")
    anchors: AnchorStyle = Field("exact", description="Style of anchors; torchvision's are rounded to whole pixels.")
    clip_before_nms: bool = Field(True, description="Clip boxes to the image before NMS, not after.")
    positive_iou: float = Field(0.5, gt=0, le=1, description="IoU with a box from which an anchor is positive.")
    negative_iou: float = Field(0.4, gt=0, le=1, description="IoU below which an anchor is background.")
    focal_alpha: float = Field(0.25, ge=0, le=1, description="Weight of positives in the focal loss, 0 to 1.")
    focal_gamma: float = Field(2.0, ge=0, description="Exponent of the focal loss.")
    # paper B.3
    pretext_samples: int = Field(2048, ge=1, description="Anchors per image in the contrast of pre-training.")
    score_threshold: float = Field(0.05, ge=0, le=1, description="Least score of a detection.")
    detections_per_level: int = Field(1000, ge=1, description="Best N detections per level, before NMS.")
    nms_iou: float = Field(0.5, ge=0, le=1, description="IoU above which the worse of two boxes of a class is dropped.")
    max_detections: int = Field(100, ge=1, description="Best N detections per image.")

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.negative_iou > self.positive_iou:
            raise ValueError("negative_iou must not be above positive_iou")
        if "group" in (self.neck_norm, self.head_norm):
            check_group_channels(self.neck_channels)
        return self

    def build(self, backbone: Backbone, num_classes: int) -> "RetinaNet":
        """Build a RetinaNet around `backbone`; everything else has fresh weights."""
        return RetinaNet(self, backbone, num_classes)


class RetinaNetHead(nn.Module):
    """Two towers of 3x3 convolutions, shared by all levels: one for classes, one for boxes; see `conv_tower`."""

    def __init__(self, channels: int, num_convs: int, norm: NormName) -> None:
        super().__init__()
        self.class_tower = conv_tower(channels, num_convs, norm)
        self.box_tower = conv_tower(channels, num_convs, norm)


class RetinaNet(Detector):
    """One class score per anchor and class, one box per anchor; 9 anchors a cell, see `AnchorGrid`.

    `forward` returns scalars, both per positive anchor:
        loss_cls: focal loss of all classes of all anchors that are not ignored.
        loss_box_reg: L1 distance of predicted and true offsets of the positive anchors.

    Scores of detections are sigmoids of the class logits.
    """

    levels = ("c3", "c4", "c5")  # the neck makes P3..P7 of them
    class_branch = ("head.class_tower",)
    box_branch = ("head.box_tower", "box_predictor")

    def __init__(self, config: RetinaNetConfig, backbone: Backbone, num_classes: int) -> None:
        channels = config.neck_channels
        super().__init__(backbone, feature_dim=channels)
        self.config = config
        self.neck = FPN(backbone.use_levels(self.levels), channels, config.neck_norm, extra_levels=config.extra_levels)
        self.head = RetinaNetHead(channels, config.head_convs, config.head_norm)
        self.anchors = AnchorGrid(STRIDES, SCALES, RATIOS, config.anchors)
        self.num_slots = self.anchors.num_per_cell
        # channel = anchor * K + class, and anchor * 4 + (dx, dy, dw, dh), as in mmdetection and torchvision
        self.class_predictor = nn.Conv2d(channels, self.num_slots * num_classes, 3, padding=1)
        self.box_predictor = nn.Conv2d(channels, self.num_slots * 4, 3, padding=1)
        initialise_head([self.head, self.class_predictor, self.box_predictor], self.class_predictor)

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch; images without boxes are negatives."""
        features = self.extract(images, with_assistant=True)
        return weigh_assistant([self._losses(one, targets) for one in features.one_by_one()])

    def _losses(self, features: Features, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        pyramid = self.neck(features.maps)
        anchors, matched = self.assign(grids_of(pyramid), features.sizes_hw, targets)
        return {
            "loss_cls": self.class_loss(self.predict_logits(pyramid), matched, targets),
            "loss_box_reg": self.box_loss(
                self.predict_deltas(pyramid), anchors, matched, targets, places_in_rows(matched >= 0)
            ),
        }

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, best first."""
        pyramid = self.neck(self.extract(images).maps)
        logits, deltas = self.predict_logits(pyramid), self.predict_deltas(pyramid)
        anchors = self.anchors(grids_of(pyramid))
        return [
            self.postprocess([level[i] for level in logits], [level[i] for level in deltas], anchors, size_hw)
            for i, size_hw in enumerate(images.sizes_hw)
        ]

    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Return sampled anchors, image by image, positives before background. The loss is `loss_box_reg`."""
        pyramid = self.neck(features.maps)
        anchors, matched = self.assign(grids_of(pyramid), features.sizes_hw, proposals)
        samples = sample_each_image(matched, self.config.pretext_samples)
        image_index = image_index_of([len(places) for places in samples.places], matched.device)
        anchor_index = torch.cat(samples.places)
        class_maps = [self.head.class_tower(level) for level in pyramid]
        losses = {}
        if with_losses:
            deltas = self.predict_deltas(pyramid)
            losses["loss_box_reg"] = self.box_loss(deltas, anchors, matched, proposals, samples.positives)
            if self.trains_objectness:
                logits = [self.class_predictor(level) for level in class_maps]
                losses["loss_objectness"] = self.class_loss(logits, matched, proposals)
        return BoxCandidates(
            features=gather_cells(class_maps, image_index, anchor_index // self.num_slots),
            slots=anchor_index % self.num_slots,
            instance_ids=instance_ids_of(proposals, matched[image_index, anchor_index], image_index),
            losses=losses,
        )

    def predict_logits(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Return the class logits of every anchor: (B, A*K, H, W) per level."""
        return [self.class_predictor(self.head.class_tower(level)) for level in pyramid]

    def predict_deltas(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Return the box offsets of every anchor: (B, A*4, H, W) per level."""
        return [self.box_predictor(self.head.box_tower(level)) for level in pyramid]

    def assign(
        self, grids_hw: list[SizeHW], sizes_hw: Sequence[SizeHW], targets: Sequence[BoxTargets]
    ) -> tuple[Tensor, Tensor]:
        """Return (anchors, 4) xyxy anchors and their (B, anchors) matches; every box claims an anchor.

        See `AnchorGrid.match`.
        """
        return self.anchors.match(
            grids_hw,
            sizes_hw,
            targets,
            positive_iou=self.config.positive_iou,
            negative_iou=self.config.negative_iou,
            min_claim_iou=0.0,
        )

    def class_loss(self, logits: list[Tensor], matched: Tensor, targets: Sequence[BoxTargets]) -> Tensor:
        """Return the scalar `loss_cls`, from (B, A*K, H, W) logits per level and (B, anchors) matches."""
        class_ids = class_ids_of(targets, matched)
        config = self.config
        total = sum_focal_loss(logits, class_ids, self.num_slots, alpha=config.focal_alpha, gamma=config.focal_gamma)
        return total / _num_positives(matched)

    def box_loss(
        self,
        deltas: list[Tensor],
        anchors: Tensor,
        matched: Tensor,
        targets: Sequence[BoxTargets],
        positives: list[Tensor],
    ) -> Tensor:
        """Return the scalar `loss_box_reg`, 0 without positive anchors.

        Args:
            deltas: (B, A*4, H, W) per level.
            anchors: (anchors, 4) xyxy.
            matched: (B, anchors) as from `assign`.
            targets: boxes of each image.
            positives: (P,) int64 for each image, indices of the positive anchors.
        """
        image_index, anchor_index = image_index_of([len(p) for p in positives], matched.device), torch.cat(positives)
        boxes = matched_boxes(targets, matched, image_index, anchor_index)
        predicted = gather_slots(deltas, image_index, anchor_index, self.num_slots)  # (P, 4)
        return (predicted - encode_boxes(boxes, anchors[anchor_index])).abs().sum() / _num_positives(matched)

    def postprocess(self, logits: list[Tensor], deltas: list[Tensor], anchors: Tensor, size_hw: SizeHW) -> Detections:
        """Return the detections of one image.

        Args:
            logits: (A*K, H, W) per level.
            deltas: (A*4, H, W) per level.
            anchors: (anchors, 4) xyxy.
            size_hw: height and width of the image in pixels, without padding.
        """
        boxes, scores, class_ids = [], [], []
        frame_hw = size_hw if self.config.clip_before_nms else None
        sizes = [level.shape[-2] * level.shape[-1] * self.num_slots for level in logits]
        for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors.split(sizes), strict=True):
            score, anchor_index, class_id = select_scores(
                level_logits,
                self.num_slots,
                score_threshold=self.config.score_threshold,
                max_scores=self.config.detections_per_level,
            )
            delta = level_deltas.float().permute(1, 2, 0).reshape(-1, 4)[anchor_index]
            boxes.append(decode_boxes(delta, level_anchors[anchor_index], frame_hw))
            scores.append(score)
            class_ids.append(class_id)
        found = select_detections(
            torch.cat(boxes),
            torch.cat(scores),
            torch.cat(class_ids),
            nms_iou=self.config.nms_iou,
            max_detections=self.config.max_detections,
        )
        return found if frame_hw else replace(found, boxes=clip_boxes_to_image(found.boxes, size_hw))


def _num_positives(matched: Tensor) -> Tensor:
    """Count the positive anchors of the batch, at least one per image; mmdetection divides losses by this number."""
    return (matched >= 0).sum(dim=1).clamp(min=1).sum()
