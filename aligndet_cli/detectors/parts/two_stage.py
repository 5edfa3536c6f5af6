"""The part that the R-CNN families share: losses, detections and pretext candidates of one head or several.

Each head classifies RoIs and refines them; in a cascade, the next head works on what the one before has refined.

Source: mmdetection `TwoStageDetector`, `StandardRoIHead`, `CascadeRoIHead` and `BBoxHead`; the authors'
`_base_/models/selfsup_mask_rcnn_r50_fpn.py` and `AlignDet/models/roi_heads/htc_roi_head.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors.interface import BoxCandidates, Detections, Detector, Features, weigh_assistant
from aligndet_cli.detectors.parts.anchors import SizeHW
from aligndet_cli.detectors.parts.box_coder import decode_boxes, encode_boxes
from aligndet_cli.detectors.parts.cells import send
from aligndet_cli.detectors.parts.fpn import FPN
from aligndet_cli.detectors.parts.matching import class_ids_of, instance_ids_of
from aligndet_cli.detectors.parts.postprocess import select_detections
from aligndet_cli.detectors.parts.rcnn_config import HeadRules, RCNNConfig
from aligndet_cli.detectors.parts.roi_head import BoxHead, Pyramid, RoiSamples, sample_rois, to_rois
from aligndet_cli.detectors.parts.rpn import RPN
from aligndet_cli.detectors.parts.sampling import places_in_rows

LEVELS = ("c2", "c3", "c4", "c5")  # of the backbone; the neck makes P2..P6 of them
AGREEING_IOU = 0.8  # of boxes that are the same but for a few pixels
CLASS_STD, BOX_STD = 0.01, 0.001  # initial weights of the two predictors


class RCNN(Detector):
    """Base of the R-CNN families. Each adds head, class predictor and box predictor, in this order.

    Attributes:
        head: a `BoxHead`, or the list of those of a cascade; the two predictors likewise.
        class_predictor: (S, C) features to (S, K + 1) logits, background last.
        box_predictor: (S, C) features to (S, K * 4) offsets, class * 4 + (dx, dy, dw, dh); or (S, 4) for all classes.
    """

    levels = LEVELS
    box_branch = ("rpn", "box_predictor")
    has_objectness = True
    head: nn.Module
    box_predictor: nn.Module

    def __init__(self, config: RCNNConfig, backbone: Backbone) -> None:
        super().__init__(backbone, feature_dim=config.head_features)
        self.config = config
        # The RPN proposes boxes on P2..P6; heads work on P2..P5.
        self.neck = FPN(backbone.use_levels(LEVELS), config.neck_channels, config.neck_norm, extra_levels="pooled")
        self.rpn = RPN(config)

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of a labelled batch; images without boxes are negatives."""
        trained = train_boxes(self, self.pyramids(images), images.sizes_hw, targets)
        return weigh_assistant([losses for losses, _ in trained])

    def pyramid(self, maps: dict[str, Tensor]) -> Pyramid:
        """Return P2..P6 from the backbone's maps (B, C, H, W) by level."""
        return Pyramid(self.neck(maps))

    def pyramids(self, images: ImageBatch) -> list[Pyramid]:
        """Return the maps to train on: of the assistant, if there is one, and of the lead."""
        return [self.pyramid(one.maps) for one in self.extract(images, with_assistant=True).one_by_one()]

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, best first."""
        return detect_boxes(self, self.pyramid(self.extract(images).maps), images.sizes_hw)

    @torch.no_grad()
    def find_objects(self, images: ImageBatch) -> list[Detections]:
        """Return the boxes of `find_boxes` of each image, best first."""
        return find_boxes(self, self.pyramid(self.extract(images).maps), images.sizes_hw)

    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Return RoIs of each head, see `pretext_candidates`; masks take no part."""
        lead = features.one_by_one()[-1]
        return pretext_candidates(self, lead, proposals, with_losses=with_losses)[0]

    def all_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> list[BoxCandidates]:
        """Return `box_candidates` in the features of an assistant, if they are there, and in those of the lead.

        Both sample from the proposals that the RPN finds in the lead's, as in the authors' `selfsup_cbv2.py`.
        """
        return pretext_candidates(self, features, proposals, with_losses=with_losses)


@dataclass(frozen=True)
class RoiHead:
    """One head with its predictors, and the rules that it is trained by; see `RCNN`."""

    layers: nn.Module
    class_predictor: nn.Module
    box_predictor: nn.Module
    rules: HeadRules

    def offsets(self, features: Tensor) -> Tensor:
        """Return (S, K, 4) offsets for `decode_boxes`, or (S, 1, 4) for all classes, from (S, C) features."""
        predicted: Tensor = self.box_predictor(features).float().unflatten(1, (-1, 4))
        return predicted * send(self.rules.delta_std, predicted.device)


@dataclass(frozen=True)
class Trained:
    """A head in training with its RoIs, and their (S, C) features."""

    head: RoiHead
    samples: RoiSamples
    features: Tensor

    @torch.no_grad()
    def refine(self, sizes_hw: Sequence[SizeHW]) -> list[Tensor]:
        """Return the boxes that a class-agnostic head makes of its RoIs, (P, 4) per image, without the true boxes."""
        offsets = self.head.offsets(self.features).squeeze(1).split([len(boxes) for boxes in self.samples.boxes])
        refined = [decode_boxes(*of_image) for of_image in zip(offsets, self.samples.boxes, sizes_hw, strict=True)]
        proposed = places_in_rows(pad_sequence([~is_box for is_box in self.samples.is_box], batch_first=True))
        return [boxes[places] for boxes, places in zip(refined, proposed, strict=True)]


def heads_of(model: RCNN) -> list[RoiHead]:
    """Return the heads of a detector, first one first."""
    parts = model.head, model.class_predictor, model.box_predictor
    lists = [part if isinstance(part, nn.ModuleList) else [part] for part in parts]
    return [RoiHead(*parts) for parts in zip(*lists, model.config.head_rules(), strict=True)]


def build_head(config: RCNNConfig, num_classes: int, num_offsets: int) -> tuple[BoxHead, nn.Linear, nn.Linear]:
    """Build a head, its class predictor and its box predictor with fresh weights.

    Args:
        num_offsets: 4 for each class that has a box of its own, or 4 in all.
    """
    head = BoxHead(config)
    predictors = nn.Linear(config.head_features, num_classes + 1), nn.Linear(config.head_features, num_offsets)
    for predictor, std in zip(predictors, (CLASS_STD, BOX_STD), strict=True):
        nn.init.normal_(predictor.weight, std=std)
        nn.init.zeros_(predictor.bias)
    return head, *predictors


def train_boxes(
    model: RCNN, pyramids: Sequence[Pyramid], sizes_hw: Sequence[SizeHW], targets: Sequence[BoxTargets]
) -> list[tuple[dict[str, Tensor], list[Trained]]]:
    """Return the scalar losses of `FasterRCNN.forward` for each pyramid, and what each head worked on.

    `loss_cls` and `loss_box_reg` are sums over the heads, with their weights. All pyramids have the proposals that the
    RPN finds in the last one; then each refines them by itself.

    Args:
        pyramids: of an assistant and the lead, or of the only backbone.
        sizes_hw: height and width of each image in pixels, without padding.
        targets: boxes of each image.
    """
    config = model.config
    outputs = [model.rpn(pyramid.levels) for pyramid in pyramids]
    losses = [model.rpn.losses(output, sizes_hw, targets, config.sampling()[0]) for output in outputs]
    proposals = model.rpn.propose(outputs[-1], sizes_hw, config.train_proposals_per_level, config.train_proposals)
    trained = [train_heads(model, pyramid, sizes_hw, targets, proposals) for pyramid in pyramids]
    for of_pyramid, heads in zip(losses, trained, strict=True):
        of_pyramid["loss_cls"] = total([class_loss(one, targets) for one in heads])
        of_pyramid["loss_box_reg"] = total([box_loss(one, targets) for one in heads])
    return list(zip(losses, trained, strict=True))


def train_heads(
    model: RCNN,
    pyramid: Pyramid,
    sizes_hw: Sequence[SizeHW],
    targets: Sequence[BoxTargets],
    proposals: list[Tensor],
) -> list[Trained]:
    """Run all heads in training, the first on samples of proposals, (P, 4) xyxy per image; others as `train_boxes`."""
    trained: list[Trained] = []
    for head in heads_of(model):
        if trained:
            proposals = trained[-1].refine(sizes_hw)
        samples = sample_for(head, model.config, proposals, targets)
        trained.append(Trained(head, samples, roi_features(head, model.config, pyramid, samples.rois())))
    return trained


def sample_for(head: RoiHead, config: RCNNConfig, proposals: list[Tensor], targets: Sequence[BoxTargets]) -> RoiSamples:
    """Sample the RoIs that a head is fine-tuned on from (P, 4) xyxy proposals per image, and from the true boxes."""
    return sample_rois(
        proposals,
        targets,
        positive_iou=head.rules.positive_iou,
        sampling=config.sampling()[1],
        only_positives=False,
        claims=head.rules.claims,
    )


def detect_boxes(model: RCNN, pyramid: Pyramid, sizes_hw: Sequence[SizeHW]) -> list[Detections]:
    """Return the detections of each image, without masks.

    Scores are the softmax of the heads' mean logits; boxes are the last head's.
    """
    config, output = model.config, model.rpn(pyramid.levels)
    proposals = model.rpn.propose(output, sizes_hw, config.test_proposals_per_level, config.max_proposals)
    found = []
    for logits, offsets, boxes, size_hw in zip(*run_heads(model, pyramid, sizes_hw, proposals), sizes_hw, strict=True):
        scores = logits.softmax(dim=1)[:, :-1]  # (P, K)
        roi, class_ids = (scores > config.score_threshold).nonzero(as_tuple=True)
        chosen = offsets.expand(-1, scores.shape[1], -1)[roi, class_ids]
        decoded, of_class = decode_boxes(chosen, boxes[roi], size_hw), scores[roi, class_ids]
        is_kept = (decoded[:, 2:] - decoded[:, :2] >= config.min_box_side).all(dim=1)
        found.append(
            select_detections(
                decoded[is_kept],
                of_class[is_kept],
                class_ids[is_kept],
                nms_iou=config.nms_iou,
                max_detections=config.max_detections,
                nms_type=config.nms_type,
            )
        )
    return found


def run_heads(
    model: RCNN, pyramid: Pyramid, sizes_hw: Sequence[SizeHW], proposals: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Run all heads, each on the boxes that the one before has refined.

    Args:
        pyramid: maps of the batch.
        sizes_hw: height and width of each image in pixels, without padding.
        proposals: (P, 4) xyxy per image.

    Returns:
        For each image: (P, K + 1) float32 logits, the mean of the heads'; the last head's `RoiHead.offsets`; and the
        (P, 4) xyxy boxes that they refine.
    """
    counts = [len(boxes) for boxes in proposals]
    logits: list[Tensor] = []
    offsets: list[Tensor] = []
    for head in heads_of(model):
        if logits:
            pairs = zip(offsets, proposals, sizes_hw, strict=True)
            proposals = [decode_boxes(offset.squeeze(1), boxes, size_hw) for offset, boxes, size_hw in pairs]
        features = roi_features(head, model.config, pyramid, to_rois(proposals))  # (S, C)
        logits.append(head.class_predictor(features).float())
        offsets = list(head.offsets(features).split(counts))
    mean = torch.stack(logits).mean(dim=0) if len(logits) > 1 else logits[0]
    return list(mean.split(counts)), offsets, proposals


def find_boxes(model: RCNN, pyramid: Pyramid, sizes_hw: Sequence[SizeHW]) -> list[Detections]:
    """Return the RPN's proposals of each image, refined by the heads of a single class.

    The score of a box is its objectness times the share of all proposals that the heads refine to the same box: places
    that regression leads to from many sides are objects more often than those that score high in the RPN
    (examples/second-round.md). Of boxes that overlap more than `nms_iou`, the best is kept.
    """
    config, output = model.config, model.rpn(pyramid.levels)
    proposed = model.rpn.propose_scored(output, sizes_hw, config.test_proposals_per_level, config.max_proposals)
    refined = refine_boxes(model, pyramid, sizes_hw, [boxes for boxes, _ in proposed])
    return [
        select_detections(
            boxes,
            scores * agreement_of(boxes),
            torch.zeros_like(scores, dtype=torch.int64),
            nms_iou=config.nms_iou,
            max_detections=config.max_detections,
        )
        for boxes, (_, scores) in zip(refined, proposed, strict=True)
    ]


def refine_boxes(model: RCNN, pyramid: Pyramid, sizes_hw: Sequence[SizeHW], proposals: list[Tensor]) -> list[Tensor]:
    """Return (P, 4) xyxy per image: what the heads of a single class make of proposals; arguments as in `run_heads`."""
    _, offsets, boxes = run_heads(model, pyramid, sizes_hw, proposals)
    return [decode_boxes(*of_image) for of_image in zip([o[:, 0] for o in offsets], boxes, sizes_hw, strict=True)]


def agreement_of(boxes: Tensor) -> Tensor:
    """Return (S,) in 0..1: the sum of each box's IoU with all that overlap it by `AGREEING_IOU` or more, by S.

    Args:
        boxes: (S, 4) xyxy.
    """
    iou = box_iou(boxes, boxes)
    return torch.where(iou >= AGREEING_IOU, iou, 0).sum(dim=1) / max(len(boxes), 1)


def pretext_candidates(
    model: RCNN, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
) -> list[BoxCandidates]:
    """Return the proposals and RoIs that each head samples, head by head and there image by image, for each pyramid.

    The losses are `loss_objectness`, `loss_rpn_box_reg` and `loss_box_reg`; arguments as in `Detector`. All heads
    sample from the same proposals of the RPN, by their own limits of IoU: what a head refines does not reach the next.
    With an assistant, those proposals are of the lead's pyramid, which comes last.

    Source: the authors' `_base_/models/selfsup_mask_rcnn_r50_fpn.py`, and `AlignDet/models/roi_heads/htc_roi_head.py`
    for three heads, where `interleaved` leaves refinement to a mask head that is not there. There the box predictor of
    Faster and Mask R-CNN has rows for every instance id; here all are of class "object" (docs/differences.md 13).
    """
    config, sampling, sizes_hw = model.config, model.config.pretext_sampling(), features.sizes_hw
    pyramids = [model.pyramid(one.maps) for one in features.one_by_one()]
    with torch.set_grad_enabled(with_losses and torch.is_grad_enabled()):
        # The assistant's serve the losses alone.
        outputs = [model.rpn(pyramid.levels) for pyramid in (pyramids if with_losses else pyramids[-1:])]
    losses: list[dict[str, Tensor]] = [{} for _ in pyramids]
    if with_losses:
        losses = [model.rpn.losses(output, sizes_hw, proposals, sampling.anchors) for output in outputs]
    rpn_boxes = model.rpn.propose(outputs[-1], sizes_hw, config.train_proposals_per_level, config.train_proposals)
    found = []
    for pyramid, of_pyramid in zip(pyramids, losses, strict=True):
        trained = [_sample_for_pretext(head, config, pyramid, rpn_boxes, proposals) for head in heads_of(model)]
        if with_losses:
            of_pyramid["loss_box_reg"] = total([box_loss(one, proposals) for one in trained])
        found.append(_candidates_of(trained, proposals, of_pyramid))
    return found


def _sample_for_pretext(
    head: RoiHead,
    config: RCNNConfig,
    pyramid: Pyramid,
    rpn_boxes: list[Tensor],
    proposals: Sequence[BoxTargets],
) -> Trained:
    """Return the RoIs that a head samples in pre-training from (P, 4) xyxy boxes of the RPN, and their features."""
    sampling = config.pretext_sampling()
    samples = sample_rois(
        rpn_boxes,
        proposals,
        positive_iou=head.rules.positive_iou,
        sampling=sampling.rois,
        only_positives=sampling.only_positives,
        claims=head.rules.claims,
    )
    return Trained(head, samples, roi_features(head, config, pyramid, samples.rois()))


def _candidates_of(
    trained: Sequence[Trained], proposals: Sequence[BoxTargets], losses: dict[str, Tensor]
) -> BoxCandidates:
    instance_ids = torch.cat([instance_ids_of(proposals, *one.samples.all_matched()) for one in trained])
    return BoxCandidates(
        torch.cat([one.features for one in trained]),
        torch.zeros_like(instance_ids),
        instance_ids,
        losses,
        tuple(len(one.features) for one in trained),
    )


def roi_features(head: RoiHead, config: RCNNConfig, pyramid: Pyramid, rois: Tensor) -> Tensor:
    """Return (S, C) features of (S, 5) RoIs for the predictors of a head."""
    pooled, row = pyramid.pool(rois, config.pool_size, config)
    features: Tensor = head.layers(pooled)
    return features[row]


def class_loss(trained: Trained, targets: Sequence[BoxTargets]) -> Tensor:
    """Return the scalar mean cross-entropy of a head, times its weight."""
    class_ids = class_ids_of(targets, *trained.samples.all_matched())
    logits = trained.head.class_predictor(trained.features).float()  # (S, K + 1)
    class_ids = torch.where(class_ids >= 0, class_ids, logits.shape[1] - 1)
    return trained.head.rules.weight * cross_entropy(logits, class_ids, reduction="sum") / max(len(logits), 1)


def box_loss(trained: Trained, targets: Sequence[BoxTargets]) -> Tensor:
    """Return the scalar distance of predicted and true offsets of positive RoIs, per sampled RoI, times the weight.

    It is 0 without positive RoIs. Of the boxes of several classes, that of the true class is trained.
    """
    head, rules, features = trained.head, trained.head.rules, trained.features
    positives = trained.samples.positives()
    pairs = list(zip(positives.matched, targets, strict=True))
    boxes = torch.cat([of_image.boxes[matched] for matched, of_image in pairs])  # (P, 4)
    predicted = head.box_predictor(trained.samples.positive_rows(features)).unflatten(1, (-1, 4))  # (P, K or 1, 4)
    class_ids = torch.cat([of_image.class_ids[matched] for matched, of_image in pairs])
    if predicted.shape[1] == 1:
        class_ids = torch.zeros_like(class_ids)
    predicted = predicted[torch.arange(len(predicted), device=predicted.device), class_ids].float()
    true = encode_boxes(boxes, torch.cat(positives.boxes)) / send(rules.delta_std, boxes.device)
    distance = smooth_l1_loss(predicted, true, reduction="sum", beta=rules.box_beta)
    return rules.weight * distance / max(len(features), 1)


def total(losses: Sequence[Tensor]) -> Tensor:
    """Return the scalar sum of one loss or more."""
    return torch.stack(list(losses)).sum()
