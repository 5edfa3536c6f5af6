"""Differences of paired runs, with their 95 % interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class Delta:
    """Mean difference to the baseline over the pairs that both have.

    Attributes:
        standard_error: None with a single pair.
        interval: bounds that hold the true mean in 95 % of such comparisons (Student's t); None with a single pair.
        wins: number of pairs with a higher number than the baseline.
    """

    mean: float
    standard_error: float | None
    interval: tuple[float, float] | None
    wins: int
    num_pairs: int


def delta_of(differences: list[float]) -> Delta:
    """Return the mean of the differences of pairs, and how sure it is."""
    (mean, deviation), count = mean_and_std(differences), len(differences)
    wins = sum(value > 0 for value in differences)
    if deviation is None:
        return Delta(mean, None, None, wins, count)
    error = deviation / math.sqrt(count)
    half = float(stdtrit(count - 1, 0.975)) * error
    return Delta(mean, error, (mean - half, mean + half), wins, count)


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and the sample standard deviation; None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
