"""RoIs: sample them for training, pool their features from the pyramid, and run the box head on those."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d
from torch.nn.utils.rnn import pad_sequence

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts.cells import image_index_of
from aligndet_cli.detectors.parts.fpn import conv_tower
from aligndet_cli.detectors.parts.matching import IGNORED, match_by_iou, pad_boxes
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.detectors.parts.roi_gradient import roi_align
from aligndet_cli.detectors.parts.rpn import STRIDES
from aligndet_cli.detectors.parts.sampling import Sampling, sample_each_image

POOLED_STRIDES = STRIDES[:4]  # P2..P5; P6 is for proposals only
FINEST_SCALE = 56  # RoIs of side 56 * 2^l belong to level l
SEMANTIC_STRIDE, SEMANTIC_POOL_SIZE = 8, 14  # of the map of a semantic branch, and of RoIs on it


@dataclass(frozen=True)
class Pyramid:
    """The maps of a batch that an R-CNN works on.

    Attributes:
        levels: P2..P6, (B, C, H, W) each.
        semantic: (B, C, H/8, W/8) features of a semantic branch, which are added to those of RoIs; None without one.
        pixel_logits: (B, P, H/8, W/8) of P classes of pixels, of the same branch.
    """

    levels: list[Tensor]
    semantic: Tensor | None = None
    pixel_logits: Tensor | None = None

    def pool(self, rois: Tensor, size: int, config: RCNNConfig) -> tuple[Tensor, Tensor]:
        """Return what `pool_rois` does, with the features of a semantic branch added."""
        pooled, row = pool_rois(self.levels, rois, size, config)
        if self.semantic is None:
            return pooled, row
        return pooled + pool_semantic(self.semantic, rois[row.argsort()], size, config), row


@dataclass(frozen=True)
class RoiSamples:
    """The RoIs of a batch to train on. One list entry per image, positives before background.

    Attributes:
        boxes: (S, 4) xyxy each.
        matched: (S,) int64 each, index of the matched box of the image, or `BACKGROUND`.
        is_box: (S,) bool each, True for RoIs that are the boxes themselves and no proposals.
        num_positives: how many have a matched box.
    """

    boxes: list[Tensor]
    matched: list[Tensor]
    is_box: list[Tensor]
    num_positives: list[int]

    def rois(self) -> Tensor:
        """Return the RoIs of the whole batch: (S, 5) image index and xyxy."""
        return to_rois(self.boxes)

    def all_matched(self) -> tuple[Tensor, Tensor]:
        """Return `matched` and the image of each RoI of the whole batch, (S,) int64 each."""
        matched = torch.cat(self.matched)
        return matched, image_index_of([len(of_image) for of_image in self.matched], matched.device)

    def positives(self) -> "RoiSamples":
        """Return the P RoIs that have a matched box: (P, 4) and (P,) for each image."""
        first = self._positives_of
        return RoiSamples(first(self.boxes), first(self.matched), first(self.is_box), self.num_positives)

    def positive_rows(self, values: Tensor) -> Tensor:
        """Return (P, C), the rows of (S, C) values of all RoIs that belong to the positives."""
        return torch.cat(self._positives_of(values.split([len(boxes) for boxes in self.boxes])))

    def _positives_of(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [of_image[:num] for of_image, num in zip(values, self.num_positives, strict=True)]


@torch.no_grad()
def sample_rois(
    proposals: Sequence[Tensor],
    targets: Sequence[BoxTargets],
    *,
    positive_iou: float,
    sampling: Sampling,
    only_positives: bool,
    claims: bool = True,
) -> RoiSamples:
    """Sample RoIs to train on, from the true boxes and the proposals.

    Source: mmdetection `MaxIoUAssigner` and `RandomSampler` with `add_gt_as_proposals`.

    Args:
        proposals: (P, 4) xyxy per image.
        targets: boxes of each image.
        positive_iou: proposals are positive from this IoU on, and background below.
        sampling: numbers for one image.
        only_positives: leave out background; of several equally good proposals a box then claims just one, as in the
            official pre-training.
        claims: a box gets its best proposal, from `positive_iou` on, even if that overlaps another box more
            (mmdetection's low-quality matches).
    """
    padded, is_proposal = pad_boxes(proposals)
    if is_proposal is None:
        is_proposal = padded.new_ones(padded.shape[:2], dtype=torch.bool)
    all_matched = match_by_iou(
        padded,
        [of_image.boxes for of_image in targets],
        positive_iou=positive_iou,
        negative_iou=positive_iou,
        min_claim_iou=positive_iou if claims else math.inf,
        valid=is_proposal,
        claims_all_ties=not only_positives,
    )
    if only_positives:
        all_matched = torch.where(all_matched >= 0, all_matched, IGNORED)
    # Those of the true boxes first, each its own.
    candidates = [
        torch.cat([torch.arange(len(of_image.boxes), device=matched.device), matched[: len(proposed)]])
        for of_image, proposed, matched in zip(targets, proposals, all_matched, strict=True)
    ]
    boxes = [torch.cat([of_image.boxes, proposed]) for of_image, proposed in zip(targets, proposals, strict=True)]
    rows = pad_sequence(candidates, batch_first=True, padding_value=IGNORED)  # (B, boxes and proposals)
    samples = sample_each_image(rows, sampling.num_samples, positive_fraction=sampling.positive_fraction)
    return RoiSamples(
        [of_image[places] for of_image, places in zip(boxes, samples.places, strict=True)],
        [matched[places] for matched, places in zip(candidates, samples.places, strict=True)],
        [places < len(of_image.boxes) for places, of_image in zip(samples.places, targets, strict=True)],
        samples.num_positives,
    )


def to_rois(boxes: Sequence[Tensor]) -> Tensor:
    """Return (S, 5) image index and xyxy, from (N, 4) boxes per image."""
    joined = torch.cat(list(boxes))
    image_index = image_index_of([len(of_image) for of_image in boxes], joined.device)
    return torch.cat([image_index[:, None].to(joined.dtype), joined], dim=1)


def pool_rois(
    pyramid: Sequence[Tensor], rois: Tensor, size: int, config: RCNNConfig, level: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pool the features of RoIs, each from the level that fits its size.

    The result is sorted by level: reordering the small outputs of a head is cheaper than these large features.
    Every level takes part in the graph even if no RoI is on it, so its gradient is zero and not missing.

    Source: mmdetection `SingleRoIExtractor` and `RoIAlign(aligned=True, sampling_ratio=0)`. torchvision's
    `MultiScaleRoIAlign` does not align and takes 2 x 2 samples; it picks other levels for images below 91 pixels,
    whose padding misleads it about the strides.

    Args:
        pyramid: P2..P5 first, (B, C, H, W) each.
        rois: (S, 5) image index and xyxy.
        size: rows and columns of the result.
        config: the way of pooling.
        level: (S,) int64, 0 for P2 to 3 for P5; None: by `level_of`.

    Returns:
        (S, C, size, size) float32 features, and (S,) int64: the row of each RoI in them.
    """
    level = level_of(rois) if level is None else level
    order = level.argsort(stable=True)
    counts = (level[:, None] == torch.arange(len(POOLED_STRIDES), device=level.device)).sum(dim=0)  # (4,)
    parts = rois[order].split(counts.tolist())
    pooled = [
        roi_align(maps.float(), part, size, 1 / stride, config.roi_sampling_ratio, config.roi_aligned)
        for maps, part, stride in zip(pyramid, parts, POOLED_STRIDES, strict=False)
    ]
    return torch.cat(pooled), order.argsort()


def pool_semantic(semantic: Tensor, rois: Tensor, size: int, config: RCNNConfig) -> Tensor:
    """Return (S, C, size, size) features of RoIs (S, 5) in the map (B, C, H/8, W/8) of a semantic branch.

    Source: mmdetection `HybridTaskCascadeRoIHead`: pooled to 14 x 14, and averaged where a head wants less.
    """
    pooled = roi_align(
        semantic.float(),
        rois,
        SEMANTIC_POOL_SIZE,
        1 / SEMANTIC_STRIDE,
        config.roi_sampling_ratio,
        config.roi_aligned,
    )
    if SEMANTIC_POOL_SIZE % size == 0:  # the same, and on GPUs with a deterministic gradient
        return avg_pool2d(pooled, SEMANTIC_POOL_SIZE // size)
    return adaptive_avg_pool2d(pooled, size)


def level_of(rois: Tensor) -> Tensor:
    """Return (S,) int64: the level, 0 for P2 to 3 for P5, that fits the size of each RoI (S, 5)."""
    sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    return (sides / FINEST_SCALE + 1e-6).log2().floor().clamp(0, len(POOLED_STRIDES) - 1).long()


def kaiming_convs(module: nn.Module) -> None:
    """Initialise all convolutions of a module for ReLU, with biases 0.

    Source: mmdetection `ConvModule`.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


class BoxHead(nn.Module):
    """Convolutions and fully connected layers, shared by classes and boxes.

    Source: mmdetection `Shared4Conv1FCBBoxHead` and `Shared2FCBBoxHead`, including their initial weights.
    """

    def __init__(self, config: RCNNConfig) -> None:
        super().__init__()
        self.pool_size, features = config.pool_size, config.head_features
        self.convs = conv_tower(config.neck_channels, config.head_convs, config.head_norm)
        self.fc = nn.Linear(config.neck_channels * self.pool_size**2, features)
        self.extra_fcs = nn.ModuleList(nn.Linear(features, features) for _ in range(config.head_fcs - 1))
        kaiming_convs(self.convs)
        for fc in (self.fc, *self.extra_fcs):
            nn.init.xavier_uniform_(fc.weight)
            nn.init.zeros_(fc.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Turn (S, C, size, size) pooled RoIs into (S, D) features; D = `head_features`."""
        hidden = self.fc(self.convs(pooled).flatten(1)).relu()
        for fc in self.extra_fcs:
            hidden = fc(hidden).relu()
        return hidden
