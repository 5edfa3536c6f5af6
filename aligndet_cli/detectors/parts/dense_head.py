"""Initial weights, focal loss and best scores of heads with an output in every cell of a pyramid."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from aligndet_cli.detectors.parts.matching import IGNORED

PRIOR = 0.01  # initial score of every class in every place; RetinaNet paper §4.1
INIT_STD = 0.01  # of all convolutions of a head; RetinaNet paper §4.1, FCOS does the same


def initialise_head(modules: Sequence[nn.Module], class_predictor: nn.Conv2d) -> None:
    """Give all convolutions of `modules` small random weights, and let the scores of `class_predictor` be `PRIOR`."""
    for part in modules:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    assert class_predictor.bias is not None
    nn.init.constant_(class_predictor.bias, -math.log((1 - PRIOR) / PRIOR))


def sum_focal_loss(
    logits: Sequence[Tensor], class_ids: Tensor, num_slots: int, *, alpha: float, gamma: float
) -> Tensor:
    """Return the scalar sum of the focal loss over all classes and all places that are not ignored.

    Args:
        logits: (B, A*K, H, W) per level, channel = slot * K + class.
        class_ids: (B, sum of H*W*A over levels) int64, 0..K-1, `BACKGROUND` or `IGNORED`; levels, then rows,
            columns and slots.
        num_slots: A.
    """
    total = logits[0].new_zeros((), dtype=torch.float32)
    sizes = [level.shape[-2] * level.shape[-1] * num_slots for level in logits]
    for level, ids in zip(logits, class_ids.split(sizes, dim=1), strict=True):
        rows, columns = level.shape[-2:]
        scored = level.float().unflatten(1, (num_slots, -1))  # (B, A, K, H, W)
        known = torch.arange(scored.shape[2], device=level.device)[:, None, None]  # (K, 1, 1)
        # Permute the small ids, not the large logits.
        ids = ids.view(-1, rows, columns, num_slots).permute(0, 3, 1, 2)[:, :, None]  # (B, A, 1, H, W)
        loss = sigmoid_focal_loss(scored, (ids == known).float(), alpha=alpha, gamma=gamma)
        total = total + (loss * (ids != IGNORED)).sum()
    return total


def select_scores(
    logits: Tensor, num_slots: int, *, score_threshold: float, max_scores: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best scores of one level of one image, best first.

    Args:
        logits: (A*K, H, W), channel = slot * K + class.
        num_slots: A.
        score_threshold: scores must be above it.
        max_scores: largest S.

    Returns:
        (S,) scores in 0..1, (S,) int64 places (rows, then columns and slots), and (S,) int64 class ids.
    """
    by_slot = logits.float().sigmoid().unflatten(0, (num_slots, -1))  # (A, K, H, W)
    scores = by_slot.permute(2, 3, 0, 1).flatten()
    passed = (scores > score_threshold).nonzero().squeeze(1)
    chosen = passed[scores[passed].argsort(descending=True, stable=True)[:max_scores]]
    return scores[chosen], chosen // by_slot.shape[1], chosen % by_slot.shape[1]
