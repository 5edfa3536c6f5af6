"""Match anchors with boxes by IoU, and look up what they are matched to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
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
    boxes: Sequence[Tensor],
    *,
    positive_iou: float,
    negative_iou: float,
    min_claim_iou: float,
    valid: Tensor,
    claims_all_ties: bool = True,
) -> Tensor:
    """Match each anchor to a box of its image.

    An anchor takes the box of its largest IoU from `positive_iou` on, is background below `negative_iou` and ignored
    in between. In addition, each box claims the anchors of its largest IoU, even those with a better box; if several
    boxes claim an anchor, the last of them gets it.

    Source: mmdetection `MaxIoUAssigner`. torchvision's `Matcher` lets a claimed anchor keep its own best box instead.
    We differ: a box without any overlap claims nothing (in mmdetection it claims every anchor of IoU 0).

    Args:
        anchors: (A, 4) xyxy float32 for all images, or (B, A, 4).
        boxes: (N, 4) xyxy float32 of each image.
        positive_iou, negative_iou: see above.
        min_claim_iou: a box claims only anchors of at least this IoU.
        valid: (B, A) bool; the others are ignored and cannot be claimed.
        claims_all_ties: a box claims all anchors that tie for its largest IoU, not just the first of them.

    Returns:
        (B, A) int64: index of the box in its image, `BACKGROUND` or `IGNORED`.
    """
    matched = []
    for group in image_groups(len(boxes), anchors.device):
        ranked = rank_by_number(boxes[group], anchors.device)
        own_anchors, own_valid = anchors if anchors.dim() == 2 else anchors[group][ranked.order], valid[group]
        compared = _compare(own_anchors, ranked, own_valid[ranked.order], min_claim_iou, claims_all_ties)
        best_iou, best_box, claimed_by = (each[ranked.back] for each in compared)
        found = torch.where(best_iou >= positive_iou, best_box, IGNORED)
        found = torch.where(best_iou < negative_iou, BACKGROUND, found)
        found = torch.where(claimed_by >= 0, claimed_by, found)
        matched.append(torch.where(own_valid, found, IGNORED))
    return torch.cat(matched)


def _compare(
    anchors: Tensor, ranked: "Ranked", valid: Tensor, min_claim_iou: float, claims_all_ties: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, A) each: the largest IoU of an anchor, the box it is with, and the box that claims it or `BACKGROUND`.

    Arguments are those of `match_by_iou`, images ranked.
    """
    padded, is_box = pad_boxes(ranked.boxes)
    best_iou = anchors.new_zeros(valid.shape)
    best_box = torch.full_like(best_iou, BACKGROUND, dtype=torch.int64)
    claimed_by = best_box.clone()
    at_once = BOXES_AT_ONCE[anchors.device.type] if anchors.numel() else 0
    for first, some in ranked.chunks(at_once):
        own_anchors = anchors if anchors.dim() == 2 else anchors[first]
        # float32 as in box_iou: the equality below depends on its rounding
        iou = box_iou(padded[first, some], own_anchors).masked_fill_(~valid[first, None], -1)  # (b, n, A)
        if is_box is not None:
            iou.masked_fill_(~is_box[first, some, None], -1)
        index = torch.arange(some.start, some.stop, device=iou.device)
        chunk_iou, chunk_box = iou.max(dim=1)
        known_iou, known_box, known_claims = best_iou[first], best_box[first], claimed_by[first]  # changed in place
        is_better = chunk_iou > known_iou
        torch.where(is_better, chunk_iou, known_iou, out=known_iou)
        torch.where(is_better, chunk_box + some.start, known_box, out=known_box)
        top_iou = iou.amax(dim=2, keepdim=True)
        is_top = iou == top_iou
        if not claims_all_ties:
            is_top &= is_top.cumsum(dim=2) == 1
        is_claimed = is_top & (top_iou > 0) & (top_iou >= min_claim_iou)
        claims = torch.where(is_claimed, index[:, None], BACKGROUND).amax(dim=1)
        torch.maximum(known_claims, claims, out=known_claims)
    return best_iou, best_box, claimed_by


def image_groups(num_images: int, device: torch.device) -> Iterator[slice]:
    """Yield the images that are matched at once: one on a CPU, whose cache its matrix stays in; all on a GPU."""
    size = 1 if device.type == "cpu" else num_images
    for start in range(0, num_images, size):
        yield slice(start, start + size)


@dataclass(frozen=True)
class Ranked:
    """Images by their numbers of boxes, most first.

    Attributes:
        boxes: (N, 4) xyxy of each image.
        order: (B,) int64, takes what belongs to the images into this order; a slice of all if it is their own.
        back: the same for the way back.
    """

    boxes: Sequence[Tensor]
    order: Tensor | slice
    back: Tensor | slice

    def chunks(self, at_once: int) -> Iterator[tuple[slice, slice]]:
        """Yield images and which of their boxes to compare at once: about `at_once` boxes in all, none for 0.

        An image whose boxes are done takes no part in what follows, so one image of many boxes does not make all
        others as long: of 16 photos of COCO, 1.7 boxes are compared for each that there is.
        """
        counts = [len(of_image) for of_image in self.boxes]
        start = 0
        while at_once and start < counts[0]:
            num_images = sum(count > start for count in counts)
            stop = min(start + max(1, at_once // num_images), counts[0])
            yield slice(0, num_images), slice(start, stop)
            start = stop


def rank_by_number(boxes: Sequence[Tensor], device: torch.device) -> Ranked:
    """Rank images by their boxes (N, 4)."""
    order = sorted(range(len(boxes)), key=lambda image: -len(boxes[image]))
    if order == list(range(len(boxes))):
        return Ranked(boxes, slice(None), slice(None))
    back = sorted(range(len(boxes)), key=order.__getitem__)
    return Ranked([boxes[image] for image in order], send(order, device), send(back, device))


def pad_boxes(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return boxes (N, 4) of each image in one tensor, (B, most boxes, 4), filled up with zeros.

    Also returns (B, most boxes) bool, True for what is a box; None if all are.
    """
    counts = [len(of_image) for of_image in boxes]
    padded = pad_sequence(list(boxes), batch_first=True)
    if len(set(counts)) == 1:
        return padded, None
    places = torch.arange(max(counts), device=padded.device)
    return padded, places < send(counts, padded.device)[:, None]


def matched_boxes(
    targets: Sequence[BoxTargets], matched: Tensor, image_index: Tensor, candidate_index: Tensor
) -> Tensor:
    """Return the (P, 4) xyxy boxes that positive candidates are matched to.

    Args:
        targets: boxes of each image.
        matched: (B, A) as from `match_by_iou` for each image.
        image_index, candidate_index: (P,) int64 rows and columns of positive entries of `matched`.
    """
    boxes = torch.cat([of_image.boxes for of_image in targets])
    return boxes[matched[image_index, candidate_index] + _first_rows(targets, matched.device)[image_index]]


def class_ids_of(targets: Sequence[BoxTargets], matched: Tensor, image_index: Tensor | None = None) -> Tensor:
    """Return the class ids of the boxes that candidates are matched to; negative entries stay as they are.

    Args:
        targets: boxes of each image.
        matched: (B, A) int64, index of the box in its image, `BACKGROUND` or `IGNORED`; or (S,) with `image_index`.
        image_index: (S,) int64, the image of each candidate.

    Returns:
        int64 in the shape of `matched`.
    """
    return look_up(_rows_of_all(targets, matched, image_index), torch.cat([one.class_ids for one in targets]))


def instance_ids_of(targets: Sequence[BoxTargets], matched: Tensor, image_index: Tensor | None = None) -> Tensor:
    """Return the instance ids (B, A) or (S,) of the proposals that candidates are matched to; see `class_ids_of`."""
    return look_up(_rows_of_all(targets, matched, image_index), all_instance_ids(targets))


def _rows_of_all(targets: Sequence[BoxTargets], matched: Tensor, image_index: Tensor | None) -> Tensor:
    """Turn indices of boxes in their images into places among those of all images; see `class_ids_of`."""
    first = _first_rows(targets, matched.device)
    return torch.where(matched >= 0, matched + (first[:, None] if image_index is None else first[image_index]), matched)


def all_instance_ids(targets: Sequence[BoxTargets]) -> Tensor:
    """Return the ids (N,) int64 of the proposals of all images."""
    found = [of_image.instance_ids for of_image in targets]
    assert all(ids is not None for ids in found), "the pretext gives every proposal an instance id"
    return torch.cat([ids for ids in found if ids is not None])


def _first_rows(targets: Sequence[BoxTargets], device: torch.device) -> Tensor:
    """Return (B,) int64 places of each image's first box among those of all images."""
    counts = [len(of_image.boxes) for of_image in targets]
    return send([sum(counts[:image]) for image in range(len(counts))], device)


def look_up(matched: Tensor, values: Tensor) -> Tensor:
    """Replace indices in `matched` (...) by the `values` (N,) int64 there; negative entries stay as they are."""
    if not len(values):
        return matched
    return torch.where(matched >= 0, values[matched.clamp(min=0)], matched)
