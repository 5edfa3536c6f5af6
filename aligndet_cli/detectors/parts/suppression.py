"""Suppression of overlapping boxes that on a CPU takes a fraction of torchvision's time, and equals it to the bit."""

import numpy as np
import torch
import torchvision.ops
from numpy.typing import NDArray
from torch import Tensor

from aligndet_cli.compiling import Floats, Ints, compiled
from aligndet_cli.detectors.parts.roi_gradient import is_traced

_ZERO = np.float32(0)
_MOST_SHIFTED = 1000  # torchvision suppresses up to so many boxes all at once, moved apart by group


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, nms_iou: float) -> Tensor:
    """Return torchvision's `batched_nms`: (M,) int64 places of the boxes that are kept, best first.

    torchvision's own serves GPUs, and networks that are compiled or exported, whose tools know it.

    Args:
        boxes: (N, 4) xyxy float32.
        scores: (N,) float32.
        groups: (N,) int64; boxes only suppress those of their group.
        nms_iou: a box is suppressed by a better one above this IoU.
    """
    if is_traced(boxes) or boxes.device.type != "cpu" or boxes.dtype != torch.float32 or not len(boxes):
        return torchvision.ops.batched_nms(boxes, scores, groups, nms_iou)
    order = scores.sort(stable=True, descending=True).indices
    if len(boxes) <= _MOST_SHIFTED:
        shifted = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
        return order[_find_kept(shifted[order], torch.tensor([len(order)]), nms_iou)]
    order = order[groups[order].sort(stable=True).indices]  # group by group, each best first
    sizes = groups[order].unique_consecutive(return_counts=True)[1]
    kept = order[_find_kept(boxes[order], sizes.cumsum(0), nms_iou)].sort().values
    return kept[scores[kept].sort(descending=True).indices]  # of equal scores, the first is torchvision's


def _find_kept(boxes: Tensor, ends: Tensor, nms_iou: float) -> Tensor:
    limit = np.float32(nms_iou)
    if float(limit) > nms_iou:  # torchvision compares with the limit in 64 bits
        limit = np.nextafter(limit, _ZERO)
    return torch.from_numpy(_keep(boxes.T.contiguous().numpy(), ends.numpy(), limit))


@compiled
def _keep(corners: Floats, ends: Ints, limit: np.float32) -> NDArray[np.bool_]:
    """Return (N,) True for the boxes that no better one of their group suppresses.

    In float32 and in torchvision's order of operations.

    Args:
        corners: (4, N) x1, y1, x2, y2; the boxes of each group follow each other, best first.
        ends: (G,) place behind the last box of each group.
        limit: greatest IoU that is kept.
    """
    left, top, right, bottom = corners[0], corners[1], corners[2], corners[3]
    areas = (right - left) * (bottom - top)
    is_dropped = np.zeros(len(areas), np.uint8)
    start = 0
    for end in ends:
        for best in range(start, end):
            if is_dropped[best]:
                continue
            x1, y1, x2, y2, area = left[best], top[best], right[best], bottom[best], areas[best]
            # Parts of one row each, with places from 0, and no branches: so a processor takes several boxes at a time.
            rest = slice(best + 1, end)
            lefts, tops, rights, bottoms = left[rest], top[rest], right[rest], bottom[rest]
            others, marks = areas[rest], is_dropped[rest]
            for other in range(len(marks)):
                width = max(min(x2, rights[other]) - max(x1, lefts[other]), _ZERO)
                height = max(min(y2, bottoms[other]) - max(y1, tops[other]), _ZERO)
                shared = width * height
                marks[other] |= np.uint8(shared / (area + others[other] - shared) > limit)
        start = end
    return is_dropped == 0
