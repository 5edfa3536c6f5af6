"""Losses, detections and pretext candidates that Faster and Mask R-CNN share: proposals, then classes and boxes.

Source: mmdetection `TwoStageDetector`, `StandardRoIHead` and `BBoxHead`; the authors'
`_base_/models/selfsup_mask_rcnn_r50_fpn.py`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.ops import box_iou

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Features
from aligndet_cli.detectors.parts.anchors import SizeHW
from aligndet_cli.detectors.parts.box_coder import decode_boxes, encode_boxes
from aligndet_cli.detectors.parts.cells import send
from aligndet_cli.detectors.parts.fpn import FPN
from aligndet_cli.detectors.parts.matching import look_up
from aligndet_cli.detectors.parts.postprocess import select_detections
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.detectors.parts.roi_head import BoxHead, RoiSamples, pool_rois, sample_rois, to_rois
from aligndet_cli.detectors.parts.rpn import RPN
from aligndet_cli.detectors.parts.sampling import Sampling

LEVELS = ("c2", "c3", "c4", "c5")  # of the backbone; the neck makes P2..P6 of them
DELTA_STD = (0.1, 0.1, 0.2, 0.2)  # RoIs are close to their boxes: unit of dx, dy, dw, dh
AGREEING_IOU = 0.8  # of boxes that are the same but for a few pixels
CLASS_STD, BOX_STD = 0.01, 0.001  # initial weights of the two predictors


class TwoStage(Protocol):
    """A detector with these parts.

    Attributes:
        class_predictor: (S, C) features to (S, K + 1) logits, background last.
        box_predictor: (S, C) features to (S, K * 4) offsets, class * 4 + (dx, dy, dw, dh).
    """

    config: RCNNConfig
    neck: FPN
    rpn: RPN
    head: BoxHead
    class_predictor: nn.Linear
    box_predictor: nn.Linear


def build_box_parts(
    config: RCNNConfig, backbone: Backbone, num_classes: int
) -> tuple[FPN, RPN, BoxHead, nn.Linear, nn.Linear]:
    """Build neck, RPN, head, class predictor and box predictor with fresh weights.

    The RPN proposes boxes on P2..P6, and the head classifies and refines them on P2..P5.
    """
    neck = FPN(backbone.use_levels(LEVELS), config.neck_channels, config.neck_norm, extra_levels="pooled")
    rpn, head = RPN(config), BoxHead(config)
    predictors = nn.Linear(config.head_features, num_classes + 1), nn.Linear(config.head_features, num_classes * 4)
    for predictor, std in zip(predictors, (CLASS_STD, BOX_STD), strict=True):
        nn.init.normal_(predictor.weight, std=std)
        nn.init.zeros_(predictor.bias)
    return neck, rpn, head, *predictors


def train_boxes(
    model: TwoStage, pyramid: list[Tensor], sizes_hw: Sequence[SizeHW], targets: Sequence[BoxTargets]
) -> tuple[dict[str, Tensor], RoiSamples]:
    """Return the scalar losses of `FasterRCNN.forward` on P2..P6, (B, C, H, W) each, and the RoIs they used."""
    config = model.config
    output = model.rpn(pyramid)
    rpn_sampling = Sampling(config.rpn_samples, config.rpn_positive_fraction)
    losses = model.rpn.losses(output, sizes_hw, targets, rpn_sampling)
    samples = sample_rois(
        model.rpn.propose(output, sizes_hw, config.train_proposals_per_level),
        targets,
        positive_iou=config.roi_positive_iou,
        sampling=Sampling(config.roi_samples, config.roi_positive_fraction),
        only_positives=False,
    )
    features = roi_features(model, pyramid, samples.rois())  # (S, C)
    losses["loss_cls"] = class_loss(model.class_predictor(features), samples, targets)
    losses["loss_box_reg"] = box_loss(model.box_predictor, features, samples, targets)
    return losses, samples


def detect_boxes(model: TwoStage, pyramid: list[Tensor], sizes_hw: Sequence[SizeHW]) -> list[Detections]:
    """Return the detections of each image, without masks, from P2..P6, (B, C, H, W) each."""
    config = model.config
    proposals = model.rpn.propose(model.rpn(pyramid), sizes_hw, config.test_proposals_per_level)
    features = roi_features(model, pyramid, to_rois(proposals))  # (S, C)
    counts = [len(boxes) for boxes in proposals]
    scores = model.class_predictor(features).float().softmax(dim=1)[:, :-1].split(counts)  # (S, K) per image
    deltas = model.box_predictor(features).float().unflatten(1, (-1, 4)).split(counts)  # (S, K, 4) per image
    found = []
    for boxes, score, delta, size_hw in zip(proposals, scores, deltas, sizes_hw, strict=True):
        roi, class_ids = (score > config.score_threshold).nonzero(as_tuple=True)
        chosen = delta[roi, class_ids] * delta.new_tensor(DELTA_STD)
        decoded, of_class = decode_boxes(chosen, boxes[roi], size_hw), score[roi, class_ids]
        is_kept = (decoded[:, 2:] - decoded[:, :2] >= config.min_box_side).all(dim=1)
        found.append(
            select_detections(
                decoded[is_kept],
                of_class[is_kept],
                class_ids[is_kept],
                nms_iou=config.nms_iou,
                max_detections=config.max_detections,
            )
        )
    return found


def find_boxes(model: TwoStage, pyramid: list[Tensor], sizes_hw: Sequence[SizeHW]) -> list[Detections]:
    """Return the RPN's proposals of each image, refined by the box head of a single class.

    The score of a box is its objectness times the share of all proposals that the head refines to the same box: places
    that regression leads to from many sides are objects more often than those that score high in the RPN
    (examples/second-round.md). Of boxes that overlap more than `nms_iou`, the best is kept.
    """
    config = model.config
    proposals = model.rpn.propose_scored(model.rpn(pyramid), sizes_hw, config.test_proposals_per_level)
    features = roi_features(model, pyramid, to_rois([boxes for boxes, _ in proposals]))  # (S, C)
    deltas = model.box_predictor(features).float()  # (S, 4)
    deltas = (deltas * deltas.new_tensor(DELTA_STD)).split([len(boxes) for boxes, _ in proposals])
    found = []
    for (boxes, scores), delta, size_hw in zip(proposals, deltas, sizes_hw, strict=True):
        refined = decode_boxes(delta, boxes, size_hw)
        found.append(
            select_detections(
                refined,
                scores * agreement_of(refined),
                torch.zeros_like(scores, dtype=torch.int64),
                nms_iou=config.nms_iou,
                max_detections=config.max_detections,
            )
        )
    return found


def agreement_of(boxes: Tensor) -> Tensor:
    """Return (S,) in 0..1: the sum of each box's IoU with all that overlap it by `AGREEING_IOU` or more, by S.

    Args:
        boxes: (S, 4) xyxy.
    """
    iou = box_iou(boxes, boxes)
    return torch.where(iou >= AGREEING_IOU, iou, 0).sum(dim=1) / max(len(boxes), 1)


def pretext_candidates(
    model: TwoStage, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
) -> BoxCandidates:
    """Return the proposals and RoIs that overlap them, image by image, without background.

    The losses are `loss_objectness`, `loss_rpn_box_reg` and `loss_box_reg`; arguments as in `Detector`.

    Source: the authors' `_base_/models/selfsup_mask_rcnn_r50_fpn.py`. There the box predictor has rows for every
    instance id; here all are of class "object" (docs/differences.md 13).
    """
    config = model.config
    pyramid = model.neck(features.maps)
    losses: dict[str, Tensor] = {}
    with torch.set_grad_enabled(with_losses and torch.is_grad_enabled()):
        output = model.rpn(pyramid)
    if with_losses:
        losses = model.rpn.losses(output, features.sizes_hw, proposals, Sampling(config.pretext_rpn_samples, 1.0))
    samples = sample_rois(
        model.rpn.propose(output, features.sizes_hw, config.train_proposals_per_level),
        proposals,
        positive_iou=config.roi_positive_iou,
        sampling=Sampling(config.pretext_roi_samples, 1.0),
        only_positives=True,
    )
    pooled = roi_features(model, pyramid, samples.rois())  # (S, C)
    if with_losses:
        losses["loss_box_reg"] = box_loss(model.box_predictor, pooled, samples, proposals)
    ids = [look_up(m, t.instance_ids) for m, t in zip(samples.matched, proposals, strict=True)]
    instance_ids = torch.cat(ids)
    return BoxCandidates(pooled, torch.zeros_like(instance_ids), instance_ids, losses)


def roi_features(model: TwoStage, pyramid: list[Tensor], rois: Tensor) -> Tensor:
    """Return (S, C) features of (S, 5) RoIs on P2..P5, (B, C, H, W) each, for the predictors."""
    pooled, row = pool_rois(pyramid, rois, model.head.pool_size, model.config)
    features: Tensor = model.head(pooled)
    return features[row]


def class_loss(logits: Tensor, samples: RoiSamples, targets: Sequence[BoxTargets]) -> Tensor:
    """Return the scalar mean cross-entropy of (S, K + 1) logits."""
    class_ids = torch.cat([look_up(m, t.class_ids) for m, t in zip(samples.matched, targets, strict=True)])
    background = logits.shape[1] - 1
    class_ids = torch.where(class_ids >= 0, class_ids, background)
    return cross_entropy(logits.float(), class_ids, reduction="sum") / max(len(logits), 1)


def box_loss(predictor: nn.Linear, features: Tensor, samples: RoiSamples, targets: Sequence[BoxTargets]) -> Tensor:
    """Return the scalar L1 distance of predicted and true offsets of positive RoIs, per sampled RoI; 0 without any.

    Args:
        predictor: see `TwoStage.box_predictor`.
        features: (S, C) of the RoIs.
        samples: the S RoIs.
        targets: boxes of each image; their class picks the offsets.
    """
    is_positive = torch.cat(samples.matched) >= 0
    positives = samples.positives()
    pairs = list(zip(positives.matched, targets, strict=True))
    boxes = torch.cat([of_image.boxes[matched] for matched, of_image in pairs])  # (P, 4)
    class_ids = torch.cat([of_image.class_ids[matched] for matched, of_image in pairs])
    by_class = predictor(features[is_positive]).unflatten(1, (-1, 4))  # (P, K, 4)
    predicted = by_class[torch.arange(len(by_class), device=by_class.device), class_ids].float()
    true = encode_boxes(boxes, torch.cat(positives.boxes)) / send(DELTA_STD, boxes.device)
    return (predicted - true).abs().sum() / max(len(features), 1)
