"""Region proposal network with mmdetection's defaults.

Source: Ren et al., NIPS 2015, on a feature pyramid as in Lin et al., CVPR 2017; mmdetection `RPNHead`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts.anchors import AnchorGrid, SizeHW
from aligndet_cli.detectors.parts.box_coder import clip_each, decode_boxes, encode_boxes
from aligndet_cli.detectors.parts.cells import gather_slots, grids_of, image_index_of
from aligndet_cli.detectors.parts.matching import matched_boxes
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.detectors.parts.sampling import Sampling, places_in_rows, sample_each_image
from aligndet_cli.detectors.parts.suppression import batched_nms

STRIDES = (4, 8, 16, 32, 64)  # P2..P6
SCALES = (8.0,)  # anchor sides 32..512
RATIOS = (0.5, 1.0, 2.0)
INIT_STD = 0.01  # all convolutions

RPNOutput = tuple[list[Tensor], list[Tensor]]  # (B, A, H, W) logits and (B, A*4, H, W) deltas per level


class RPN(nn.Module):
    """3x3 convolutions on all levels, then an objectness score and a box for each of 3 anchors per cell."""

    def __init__(self, config: RCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.anchors = AnchorGrid(STRIDES, SCALES, RATIOS, config.anchors)
        channels, num_extra = config.neck_channels, config.rpn_convs - 1
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.extra_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_extra))
        self.objectness = nn.Conv2d(channels, self.anchors.num_per_cell, 1)
        self.deltas = nn.Conv2d(channels, self.anchors.num_per_cell * 4, 1)  # anchor * 4 + (dx, dy, dw, dh)
        for conv in (self.conv, *self.extra_convs, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=INIT_STD)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, pyramid: list[Tensor]) -> RPNOutput:
        """Return (B, A, H, W) objectness logits and (B, A*4, H, W) offsets per level, from P2..P6 (B, C, H, W)."""
        hidden = [self.conv(level).relu() for level in pyramid]
        for conv in self.extra_convs:
            hidden = [conv(level).relu() for level in hidden]
        return [self.objectness(level) for level in hidden], [self.deltas(level) for level in hidden]

    def assign(
        self, grids_hw: list[SizeHW], sizes_hw: Sequence[SizeHW], targets: Sequence[BoxTargets]
    ) -> tuple[Tensor, Tensor]:
        """Return (anchors, 4) xyxy anchors and their (B, anchors) matches, see `AnchorGrid.match`."""
        return self.anchors.match(
            grids_hw,
            sizes_hw,
            targets,
            positive_iou=self.config.rpn_positive_iou,
            negative_iou=self.config.rpn_negative_iou,
            min_claim_iou=self.config.rpn_claim_iou,
            within_image=self.config.ANCHORS_INSIDE,
        )

    def losses(
        self, output: RPNOutput, sizes_hw: Sequence[SizeHW], targets: Sequence[BoxTargets], sampling: Sampling
    ) -> dict[str, Tensor]:
        """Return the scalars `loss_objectness` and `loss_rpn_box_reg`, per sampled anchor; classes do not matter.

        Source: mmdetection `AnchorHead.loss`, where an image without positives (or negatives) counts as having one.

        Args:
            output: (B, A, H, W) and (B, A*4, H, W) per level, as from `forward`.
            sizes_hw: height and width of each image in pixels, without padding.
            targets: boxes of each image.
            sampling: numbers for one image.
        """
        logits, deltas = output
        anchors, matched = self.assign(grids_of(logits), sizes_hw, targets)
        samples = sample_each_image(matched, sampling.num_samples, positive_fraction=sampling.positive_fraction)
        counts = [len(places) for places in samples.places]
        image_index, anchor_index = image_index_of(counts, matched.device), torch.cat(samples.places)  # (S,) each
        is_object = matched[image_index, anchor_index] >= 0
        pairs = list(zip(counts, samples.num_positives, strict=True))
        normaliser = sum(max(positives, 1) + max(sampled - positives, 1) for sampled, positives in pairs)

        num = self.anchors.num_per_cell
        scores = gather_slots(logits, image_index, anchor_index, num).squeeze(1)
        image_index = image_index_of(samples.num_positives, matched.device)  # (P,)
        anchor_index = torch.cat(samples.sampled_positives())  # (P,)
        boxes = matched_boxes(targets, matched, image_index, anchor_index)  # (P, 4)
        predicted = gather_slots(deltas, image_index, anchor_index, num)
        distance = smooth_l1_loss(
            predicted.float(),
            encode_boxes(boxes, anchors[anchor_index]),
            reduction="sum",
            beta=self.config.RPN_BOX_BETA,
        )
        return {
            "loss_objectness": binary_cross_entropy_with_logits(scores, is_object.float(), reduction="sum")
            / normaliser,
            "loss_rpn_box_reg": distance / normaliser,
        }

    def propose(self, output: RPNOutput, sizes_hw: Sequence[SizeHW], per_level: int, count: int) -> list[Tensor]:
        """Return the boxes of `propose_scored`, (P, 4) xyxy per image."""
        return [boxes for boxes, _ in self.propose_scored(output, sizes_hw, per_level, count)]

    @torch.no_grad()
    def propose_scored(
        self, output: RPNOutput, sizes_hw: Sequence[SizeHW], per_level: int, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the proposals of each image, (P, 4) xyxy float32, best first, clipped to it, and (P,) scores in 0..1.

        Source: mmdetection `RPNHead.get_bboxes`; anchors outside the image take part.

        Args:
            output: as from `forward`.
            sizes_hw: height and width of each image in pixels, without padding.
            per_level: number of best boxes of each level that enter the suppression.
            count: number of best boxes to keep after it.
        """
        scores, deltas, anchors, levels = self.best(output, per_level)
        boxes = clip_each(decode_boxes(deltas, anchors, None), sizes_hw)  # (B, P, 4)
        with_area = places_in_rows((boxes[..., 2:] > boxes[..., :2]).all(dim=2))
        return [
            self._suppress(of_image[kept], score[kept], levels[kept], count)
            for of_image, score, kept in zip(boxes, scores, with_area, strict=True)
        ]

    def best(self, output: RPNOutput, per_level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the best P anchors say, levels from fine to coarse, each level's best first.

        Args:
            output: as from `forward`.
            per_level: largest number of anchors of a level.

        Returns:
            (B, P) scores in 0..1, (B, P, 4) offsets, (B, P, 4) xyxy anchors, and (P,) int64 levels.
        """
        logits, deltas = output
        num = self.anchors.num_per_cell
        levels = self.anchors(grids_of(logits)).split([level[0].numel() for level in logits])
        scores, picked_deltas, picked_anchors, level_index = [], [], [], []
        for index, (level_logits, level_deltas, anchors) in enumerate(zip(logits, deltas, levels, strict=True)):
            by_anchor = level_logits.float().sigmoid().permute(0, 2, 3, 1).flatten(1)  # (B, H*W*A)
            score, place = by_anchor.topk(torch.sym_min(per_level, by_anchor.shape[1]))  # (B, P)
            cells = level_deltas.unflatten(1, (num, 4)).flatten(3)  # (B, A, 4, H*W)
            image = torch.arange(cells.shape[0], device=cells.device)[:, None]
            scores.append(score)
            picked_deltas.append(cells[image, place % num, :, place // num].float())  # (B, P, 4)
            picked_anchors.append(anchors[place])
            level_index.append(torch.full_like(score[0], index, dtype=torch.int64))
        return torch.cat(scores, 1), torch.cat(picked_deltas, 1), torch.cat(picked_anchors, 1), torch.cat(level_index)

    def _suppress(self, boxes: Tensor, scores: Tensor, levels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        keep = batched_nms(boxes, scores, levels, self.config.rpn_nms_iou)[:count]
        return boxes[keep], scores[keep]
