"""Choosing a limited number of candidates."""

import torch
from torch import Tensor

from aligndet_cli.detectors.parts.matching import BACKGROUND


def sample_positives_first(matched: Tensor, num_samples: int, *, positive_fraction: float = 1.0) -> Tensor:
    """Indices of the candidates to use: positives, then background ones, drawn at random where too many.

    Draws from the global torch generator, and only when there is a choice to make.

    Source: mmdetection `RandomSampler`.

    Args:
        matched: (A,) int64, matched box, `BACKGROUND` or `IGNORED`; ignored ones are never drawn.
        num_samples: at most this many.
        positive_fraction: of `num_samples` that may be positive; background fills the rest.

    Returns:
        (S,) int64, positives before background.
    """
    positives = _draw((matched >= 0).nonzero().squeeze(1), int(num_samples * positive_fraction))
    negatives = _draw((matched == BACKGROUND).nonzero().squeeze(1), num_samples - len(positives))
    return torch.cat([positives, negatives])


def _draw(indices: Tensor, num: int) -> Tensor:
    if len(indices) <= num:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:num]]
