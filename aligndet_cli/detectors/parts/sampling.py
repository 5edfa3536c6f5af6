"""Sample a limited number of candidates to train on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from aligndet_cli.detectors.parts.matching import BACKGROUND


@dataclass(frozen=True)
class Sampling:
    """Number of candidates to sample from an image, and largest share of positive ones."""

    num_samples: int
    positive_fraction: float


def sample_positives_first(matched: Tensor, num_samples: int, *, positive_fraction: float = 1.0) -> Tensor:
    """Return (S,) int64 indices of candidates: positives, then background, at random if there are too many.

    The global torch generator is used only when there is a choice to make.

    Source: mmdetection `RandomSampler`.

    Args:
        matched: (A,) int64, index of the matched box, `BACKGROUND` or `IGNORED` (never sampled).
        num_samples: largest S.
        positive_fraction: largest share of `num_samples` for positives; background fills the rest.
    """
    positives, negatives = (matched >= 0).nonzero().squeeze(1), (matched == BACKGROUND).nonzero().squeeze(1)
    return _choose(positives, negatives, num_samples, positive_fraction)


def sample_each_image(matched: Tensor, num_samples: int, *, positive_fraction: float = 1.0) -> list[Tensor]:
    """Sample as `sample_positives_first` from each image of (B, A) matches; returns (S,) for each image.

    A GPU is asked once, for the counts of the whole batch.
    """
    masks = matched >= 0, matched == BACKGROUND  # (B, A) each
    counts = torch.stack([mask.sum(dim=1) for mask in masks]).tolist()
    # The columns of the True entries, row by row.
    columns = [
        torch.nonzero_static(mask, size=sum(of_rows))[:, 1].split(of_rows)
        for mask, of_rows in zip(masks, counts, strict=True)
    ]
    return [
        _choose(positives, negatives, num_samples, positive_fraction)
        for positives, negatives in zip(*columns, strict=True)
    ]


def _choose(positives: Tensor, negatives: Tensor, num_samples: int, positive_fraction: float) -> Tensor:
    positives = _draw(positives, int(num_samples * positive_fraction))
    return torch.cat([positives, _draw(negatives, num_samples - len(positives))])


def _draw(indices: Tensor, num: int) -> Tensor:
    if len(indices) <= num:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:num]]
