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
    positives, negatives = (matched >= 0).nonzero().squeeze(1), (matched == BACKGROUND).nonzero().squeeze(1)
    return _choose(positives, negatives, num_samples, positive_fraction)


def sample_each_image(matched: Tensor, num_samples: int, *, positive_fraction: float = 1.0) -> list[Tensor]:
    """`sample_positives_first` of each image of (B, A) matches, with the same draws.

    A GPU is asked for the counts of the whole batch, not image by image.
    """
    pairs = zip(_columns_by_row(matched >= 0), _columns_by_row(matched == BACKGROUND), strict=True)
    return [_choose(positives, negatives, num_samples, positive_fraction) for positives, negatives in pairs]


def _columns_by_row(mask: Tensor) -> tuple[Tensor, ...]:
    """Columns of the True entries of (B, A), per row."""
    rows, columns = mask.nonzero(as_tuple=True)
    return columns.split(rows.bincount(minlength=len(mask)).tolist())


def _choose(positives: Tensor, negatives: Tensor, num_samples: int, positive_fraction: float) -> Tensor:
    positives = _draw(positives, int(num_samples * positive_fraction))
    return torch.cat([positives, _draw(negatives, num_samples - len(positives))])


def _draw(indices: Tensor, num: int) -> Tensor:
    if len(indices) <= num:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:num]]
