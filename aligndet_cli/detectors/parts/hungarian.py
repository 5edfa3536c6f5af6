"""Match the queries of a set predictor with boxes, one to one, at the least total cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts.cells import send
from aligndet_cli.detectors.parts.matching import BACKGROUND

_WORST = 1e6  # cost of a prediction that is not finite: the training loop reports it, with the step and the images


@dataclass(frozen=True)
class MatchCosts:
    """Weights of the three costs of a pair: minus the probability of the class, L1 distance of boxes, minus GIoU."""

    class_weight: float
    box_weight: float
    giou_weight: float


@torch.no_grad()
def match_queries(
    logits: Tensor,
    boxes_relative: Tensor,
    targets: Sequence[BoxTargets],
    sizes_hw: Sequence[tuple[int, int]],
    costs: MatchCosts,
) -> Tensor:
    """Match each query of each decoder layer to a box of its image.

    If an image has more boxes than queries, the most expensive boxes stay without a query.

    Args:
        logits: (L, B, Q, K + 1), "no object" last.
        boxes_relative: (L, B, Q, 4) centre x, centre y, width, height as shares of the image without padding.
        targets: boxes of each image.
        sizes_hw: height and width of each image in pixels, without padding.
        costs: weights of the costs.

    Returns:
        (L, B, Q) int64: index into the boxes of the whole batch, image after image, or `BACKGROUND`.

    Source: Carion et al., ECCV 2020, eq. 1; facebookresearch/detr `HungarianMatcher`, which also prices boxes of other
        images and moves costs to the CPU layer by layer.
    """
    num_layers, num_images, num_queries = logits.shape[:3]
    all_costs = [
        _pair_costs(logits[:, i], boxes_relative[:, i], targets[i], sizes_hw[i], costs).flatten()
        for i in range(num_images)
    ]
    on_cpu = torch.cat(all_costs).cpu()  # one transfer for the batch
    matched = torch.full((num_layers, num_images, num_queries), BACKGROUND)
    counts = [len(of_image.boxes) for of_image in targets]
    parts = on_cpu.split([num_layers * num_queries * count for count in counts])
    start = 0
    for image, (count, part) in enumerate(zip(counts, parts, strict=True)):
        for layer, cost in enumerate(part.view(num_layers, num_queries, count).numpy()):
            queries, boxes = linear_sum_assignment(cost)
            matched[layer, image, torch.from_numpy(queries)] = torch.from_numpy(boxes) + start
        start += count
    return matched.to(logits.device, non_blocking=True)


def find_matched(matched: Tensor, targets: Sequence[BoxTargets]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (L * P,) layers, images and queries of the matched queries of `match_queries`, as many in every layer."""
    num_layers, _, num_queries = matched.shape
    num_matched = sum(min(len(of_image.boxes), num_queries) for of_image in targets)  # so a GPU need not be asked
    layer, image, query = torch.nonzero_static(matched >= 0, size=num_layers * num_matched).unbind(dim=1)
    return layer, image, query


def to_relative(boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Convert (N, 4) xyxy boxes in pixels to centre x, centre y, width and height in shares of the image."""
    height, width = size_hw
    return box_convert(boxes, "xyxy", "cxcywh") / send([width, height, width, height], boxes.device)


def _pair_costs(
    logits: Tensor, boxes_relative: Tensor, target: BoxTargets, size_hw: tuple[int, int], costs: MatchCosts
) -> Tensor:
    """Return the (L, Q, N) costs of one image, from (L, Q, K + 1) logits and (L, Q, 4) boxes."""
    probability = logits.float().softmax(dim=-1)[..., target.class_ids]  # (L, Q, N)
    true_boxes = to_relative(target.boxes.float(), size_hw)
    flat = boxes_relative.float().flatten(0, 1)  # (L*Q, 4)
    distance = torch.cdist(flat, true_boxes, p=1).view_as(probability)
    overlap = generalized_box_iou(
        box_convert(flat, "cxcywh", "xyxy"), box_convert(true_boxes, "cxcywh", "xyxy")
    ).view_as(probability)
    total = costs.box_weight * distance - costs.class_weight * probability - costs.giou_weight * overlap
    return total.nan_to_num(_WORST, _WORST, -_WORST)
