"""Which box an anchor is responsible for."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND = -1
IGNORED = -2

BOXES_AT_ONCE = 16  # bounds the IoU matrix: 16 boxes x 200,000 anchors = 13 MB


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
    """The box that each anchor is matched to.

    An anchor takes its best box from `positive_iou` on and is background below `negative_iou`. On top of that each
    box claims the anchors that overlap it most (all of them on exact ties) whatever else they overlap; of several
    boxes that claim an anchor the last one has it.

    Source: mmdetection `MaxIoUAssigner`. torchvision's `Matcher` lets a claimed anchor keep its own best box instead.
    We differ in that a box without any overlap claims nothing (there it claims every anchor of IoU 0).

    Args:
        anchors: (A, 4) xyxy float32.
        boxes: (N, 4) xyxy float32.
        positive_iou: from here on an anchor is positive.
        negative_iou: below it is background; between the two it is ignored.
        min_claim_iou: a box claims only anchors of at least this IoU.
        valid: (A,) bool; the others are ignored and cannot be claimed.
        claims_all_ties: whether a box claims all anchors that overlap it equally most, or the first of them.

    Returns:
        (A,) int64: index into `boxes`, `BACKGROUND` or `IGNORED`.
    """
    best_iou = anchors.new_zeros(len(anchors))
    best_box = anchors.new_full((len(anchors),), BACKGROUND, dtype=torch.int64)
    claimed_by = best_box.clone()
    for start in range(0, len(boxes) if len(anchors) else 0, BOXES_AT_ONCE):
        # float32 as in box_iou: the equality below hangs on its rounding
        iou = box_iou(boxes[start : start + BOXES_AT_ONCE], anchors).masked_fill_(~valid, -1)  # (n, A)
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


def look_up(matched: Tensor, values: Tensor | None) -> Tensor:
    """`values` of the matched boxes, (A,) int64; negative entries of `matched` stay as they are."""
    assert values is not None, "the pretext gives every proposal an instance id"
    if not len(values):
        return matched
    return torch.where(matched >= 0, values[matched.clamp(min=0)], matched)
