"""Losses, detections and pretext candidates that Faster and Mask R-CNN share: proposals, then classes and boxes.

Source: mmdetection `TwoStageDetector`, `StandardRoIHead` and `BBoxHead`; the authors'
`_base_/models/selfsup_mask_rcnn_r50_fpn.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Features
from aligndet_cli.detectors.parts.anchors import SizeHW
from aligndet_cli.detectors.parts.box_coder import decode_boxes, encode_boxes
from aligndet_cli.detectors.parts.cells import send
from aligndet_cli.detectors.parts.fpn import FPN
from aligndet_cli.detectors.parts.matching import look_up
from aligndet_cli.detectors.parts.postprocess import select_detections
from aligndet_cli.detectors.parts.roi_head import BoxHead, Pooling, RoiSamples, pool_rois, sample_rois, to_rois
from aligndet_cli.detectors.parts.rpn import RPN
from aligndet_cli.detectors.parts.sampling import Sampling

DELTA_STD = (0.1, 0.1, 0.2, 0.2)  # RoIs are close to their boxes: unit of dx, dy, dw, dh
CLASS_STD, BOX_STD = 0.01, 0.001  # initial weights of the two predictors


@dataclass(frozen=True)
class TwoStageRules:
    """Settings of training, pretext and test.

    Attributes:
        rpn_sampling, roi_sampling: in fine-tuning.
        rpn_pretext, roi_pretext: in pre-training, which samples no background RoIs.
        train_per_level, test_per_level: proposals of a level before suppression.
        positive_iou: RoIs are positive from this IoU on.
        pooling: of RoIs, for boxes and masks.
        min_box_side: detections with a shorter side are dropped.
    """

    rpn_sampling: Sampling
    roi_sampling: Sampling
    rpn_pretext: Sampling
    roi_pretext: Sampling
    train_per_level: int
    test_per_level: int
    positive_iou: float
    pooling: Pooling
    score_threshold: float
    min_box_side: float
    nms_iou: float
    max_detections: int


class TwoStage(Protocol):
    """A detector with these parts.

    Attributes:
        class_predictor: (S, C) features to (S, K + 1) logits, background last.
        box_predictor: (S, C) features to (S, K * 4) offsets, class * 4 + (dx, dy, dw, dh).
    """

    backbone: Backbone
    neck: FPN
    rpn: RPN
    head: BoxHead
    class_predictor: nn.Linear
    box_predictor: nn.Linear
    rules: TwoStageRules


def build_predictors(num_features: int, num_classes: int) -> tuple[nn.Linear, nn.Linear]:
    """Build class and box predictor with small random weights."""
    predictors = nn.Linear(num_features, num_classes + 1), nn.Linear(num_features, num_classes * 4)
    for predictor, std in zip(predictors, (CLASS_STD, BOX_STD), strict=True):
        nn.init.normal_(predictor.weight, std=std)
        nn.init.zeros_(predictor.bias)
    return predictors


def train_boxes(
    model: TwoStage, pyramid: list[Tensor], sizes_hw: Sequence[SizeHW], targets: Sequence[BoxTargets]
) -> tuple[dict[str, Tensor], RoiSamples]:
    """Return the scalar losses of `FasterRCNN.forward` on P2..P6, (B, C, H, W) each, and the RoIs they used."""
    rules = model.rules
    output = model.rpn(pyramid)
    losses = model.rpn.losses(output, sizes_hw, targets, rules.rpn_sampling)
    samples = sample_rois(
        model.rpn.propose(output, sizes_hw, rules.train_per_level),
        targets,
        positive_iou=rules.positive_iou,
        sampling=rules.roi_sampling,
        only_positives=False,
    )
    features = roi_features(model, pyramid, samples.rois())  # (S, C)
    losses["loss_cls"] = class_loss(model.class_predictor(features), samples, targets)
    losses["loss_box_reg"] = box_loss(model.box_predictor, features, samples, targets)
    return losses, samples


def detect_boxes(model: TwoStage, pyramid: list[Tensor], sizes_hw: Sequence[SizeHW]) -> list[Detections]:
    """Return the detections of each image, without masks, from P2..P6, (B, C, H, W) each."""
    proposals = model.rpn.propose(model.rpn(pyramid), sizes_hw, model.rules.test_per_level)
    features = roi_features(model, pyramid, to_rois(proposals))  # (S, C)
    counts = [len(boxes) for boxes in proposals]
    scores = model.class_predictor(features).float().softmax(dim=1)[:, :-1].split(counts)  # (S, K) per image
    deltas = model.box_predictor(features).float().unflatten(1, (-1, 4)).split(counts)  # (S, K, 4) per image
    found = []
    for boxes, score, delta, size_hw in zip(proposals, scores, deltas, sizes_hw, strict=True):
        roi, class_ids = (score > model.rules.score_threshold).nonzero(as_tuple=True)
        chosen = delta[roi, class_ids] * delta.new_tensor(DELTA_STD)
        decoded, of_class = decode_boxes(chosen, boxes[roi], size_hw), score[roi, class_ids]
        is_kept = (decoded[:, 2:] - decoded[:, :2] >= model.rules.min_box_side).all(dim=1)
        found.append(
            select_detections(
                decoded[is_kept],
                of_class[is_kept],
                class_ids[is_kept],
                nms_iou=model.rules.nms_iou,
                max_detections=model.rules.max_detections,
            )
        )
    return found


def pretext_candidates(
    model: TwoStage, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
) -> BoxCandidates:
    """Return the proposals and RoIs that overlap them, image by image, without background.

    The losses are `loss_objectness`, `loss_rpn_box_reg` and `loss_box_reg`; arguments as in `Detector`.

    Source: the authors' `_base_/models/selfsup_mask_rcnn_r50_fpn.py`. There the box predictor has rows for every
    instance id; here all are of class "object" (docs/differences.md 13).
    """
    rules = model.rules
    pyramid = model.neck(features.maps)
    losses: dict[str, Tensor] = {}
    with torch.set_grad_enabled(with_losses and torch.is_grad_enabled()):
        output = model.rpn(pyramid)
    if with_losses:
        losses = model.rpn.losses(output, features.sizes_hw, proposals, rules.rpn_pretext)
    samples = sample_rois(
        model.rpn.propose(output, features.sizes_hw, rules.train_per_level),
        proposals,
        positive_iou=rules.positive_iou,
        sampling=rules.roi_pretext,
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
    pooled, row = pool_rois(pyramid, rois, model.head.pool_size, model.rules.pooling)
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
