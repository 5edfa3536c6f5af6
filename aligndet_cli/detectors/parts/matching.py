"""Match anchors with boxes by IoU, and look up what they are matched to."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts.cells import send

BACKGROUND = -1
IGNORED = -2

# Bounds the IoU matrix: 16 boxes x 200,000 anchors = 13 MB. A GPU launches kernels slower than it runs them, so it gets
# fewer and larger ones: 100 MB.
BOXES_AT_ONCE = {"cpu": 16, "cuda": 128}


@torch.no_grad()
def match_by_iou(
    anchors: Tensor,
    boxes: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    min_claim_iou: float,
    valid: Tensor,
    claims_all_ties: bool = True,
) -> Tensor:
    """Match each anchor to a box.

    An anchor takes the box of its largest IoU from `positive_iou` on, is background below `negative_iou` and ignored
    in between. In addition, each box claims the anchors of its largest IoU, even those with a better box; if several
    boxes claim an anchor, the last of them gets it.

    Source: mmdetection `MaxIoUAssigner`. torchvision's `Matcher` lets a claimed anchor keep its own best box instead.
    We differ: a box without any overlap claims nothing (in mmdetection it claims every anchor of IoU 0).

    Args:
        anchors: (A, 4) xyxy float32.
        boxes: (N, 4) xyxy float32.
        positive_iou, negative_iou: see above.
        min_claim_iou: a box claims only anchors of at least this IoU.
        valid: (A,) bool; the others are ignored and cannot be claimed.
        claims_all_ties: a box claims all anchors that tie for its largest IoU, not just the first of them.

    Returns:
        (A,) int64: index into `boxes`, `BACKGROUND` or `IGNORED`.
    """
    best_iou = anchors.new_zeros(len(anchors))
    best_box = anchors.new_full((len(anchors),), BACKGROUND, dtype=torch.int64)
    claimed_by = best_box.clone()
    at_once = BOXES_AT_ONCE[anchors.device.type]
    for start in range(0, len(boxes) if len(anchors) else 0, at_once):
        # float32 as in box_iou: the equality below depends on its rounding
        iou = box_iou(boxes[start : start + at_once], anchors).masked_fill_(~valid, -1)  # (n, A)
        index = torch.arange(start, start + len(iou), device=boxes.device)
        chunk_iou, chunk_box = iou.max(dim=0)
        is_better = chunk_iou > best_iou
        best_iou = torch.where(is_better, chunk_iou, best_iou)
        best_box = torch.where(is_better, chunk_box + start, best_box)
        top_iou = iou.amax(dim=1, keepdim=True)
        is_top = iou == top_iou
        if not claims_all_ties:
            is_top &= is_top.cumsum(dim=1) == 1
        is_claimed = is_top & (top_iou > 0) & (top_iou >= min_claim_iou)
        claimed_by = torch.maximum(claimed_by, torch.where(is_claimed, index[:, None], BACKGROUND).amax(dim=0))
    matched = torch.where(best_iou >= positive_iou, best_box, IGNORED)
    matched = torch.where(best_iou < negative_iou, BACKGROUND, matched)
    matched = torch.where(claimed_by >= 0, claimed_by, matched)
    return torch.where(valid, matched, IGNORED)


def matched_boxes(
    targets: Sequence[BoxTargets], matched: Tensor, image_index: Tensor, candidate_index: Tensor
) -> Tensor:
    """Return the (P, 4) xyxy boxes that positive candidates are matched to.

    Args:
        targets: boxes of each image.
        matched: (B, A) as from `match_by_iou` for each image.
        image_index, candidate_index: (P,) int64 rows and columns of positive entries of `matched`.
    """
    counts = [len(of_image.boxes) for of_image in targets]
    first_rows = send([sum(counts[:image]) for image in range(len(counts))], matched.device)  # (B,)
    boxes = torch.cat([of_image.boxes for of_image in targets])
    return boxes[matched[image_index, candidate_index] + first_rows[image_index]]


def look_up(matched: Tensor, values: Tensor | None) -> Tensor:
    """Replace indices in `matched` (A,) by the `values` (N,) int64 there; negative entries stay as they are."""
    assert values is not None, "the pretext gives every proposal an instance id"
    if not len(values):
        return matched
    return torch.where(matched >= 0, values[matched.clamp(min=0)], matched)
