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


@dataclass(frozen=True)
class Samples:
    """Candidates to train on. One list entry per image; all lengths are known without asking a GPU.

    Attributes:
        places: (S,) int64 each, indices of the candidates, positives before background.
        positives: (P,) int64 each, indices of all positives, sampled or not.
        num_positives: how many positives were sampled.
    """

    places: list[Tensor]
    positives: list[Tensor]
    num_positives: list[int]

    def sampled_positives(self) -> list[Tensor]:
        """Return the sampled ones of `positives`: (P,) for each image."""
        return [places[:num] for places, num in zip(self.places, self.num_positives, strict=True)]


def sample_each_image(matched: Tensor, num_samples: int, *, positive_fraction: float = 1.0) -> Samples:
    """Sample candidates of each image: positives, then background, at random if there are too many.

    The global torch generator is used only when there is a choice to make. A GPU is asked once, for the counts of the
    whole batch.

    Source: mmdetection `RandomSampler`.

    Args:
        matched: (B, A) int64, index of the matched box, `BACKGROUND` or `IGNORED` (never sampled).
        num_samples: largest S.
        positive_fraction: largest share of `num_samples` for positives; background fills the rest.
    """
    places = places_in_rows(torch.cat([matched >= 0, matched == BACKGROUND]))
    positives, background = places[: len(matched)], places[len(matched) :]
    chosen, num_positives = [], []
    for of_image, others in zip(positives, background, strict=True):
        drawn = _draw(of_image, int(num_samples * positive_fraction))
        chosen.append(torch.cat([drawn, _draw(others, num_samples - len(drawn))]))
        num_positives.append(len(drawn))
    return Samples(chosen, positives, num_positives)


def places_in_rows(mask: Tensor) -> list[Tensor]:
    """Return the columns of the True entries, (N,) int64 for each row of a (B, A) mask; a GPU is asked once."""
    counts: list[int] = mask.sum(dim=1).tolist()
    return list(torch.nonzero_static(mask, size=sum(counts))[:, 1].split(counts))


def _draw(indices: Tensor, num: int) -> Tensor:
    if len(indices) <= num:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:num]]
