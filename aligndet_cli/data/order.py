"""Order of the images of an epoch, such that the images of a batch need little padding."""

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.sample import mix_seed

Rows = NDArray[np.int64]


def epoch_order(aspects: NDArray[np.float64], batch_size: int, *, seed: int, epoch: int) -> Rows:
    """Return a random permutation of the images in which nearly every batch holds images of one orientation.

    Images of one orientation meet at random, and batches come in random order. The images that remain of each
    orientation after whole batches form one mixed batch. It takes the squarest of about a batch of each, tall before
    wide, so that at most one part is mixed when processes or micro-batches divide it. An epoch that ends within a batch
    shares it with the next epoch: both draw the same orientation for it and keep to it while they have such images.
    If all images have one orientation, the result is a plain permutation.

    Args:
        aspects: (N,) width / height; images above 1 are wide.
        batch_size: images per step, over all processes and micro-batches. The epoch begins at position `epoch * N` of
            the stream, batches at the multiples of `batch_size`.

    Returns:
        (N,) int64 rows of `aspects`; they depend on the arguments alone.

    Source: mmdetection's `GroupSampler`, which fills up the last batch of each orientation with repeated images.
    """
    rng = np.random.default_rng(mix_seed(seed, epoch))
    shuffled = rng.permutation(len(aspects))
    is_wide = aspects > 1
    if is_wide.all() or not is_wide.any():
        return shuffled
    groups = [shuffled[~is_wide[shuffled]], shuffled[is_wide[shuffled]]]
    begin, end = epoch * len(aspects), (epoch + 1) * len(aspects)
    num_first = min(-begin % batch_size, len(aspects))
    num_last = (len(aspects) - num_first) % batch_size
    share = float(is_wide.mean())
    first = _take(groups, num_first, first=_draws_wide(share, seed, begin // batch_size))
    last = _take(groups, num_last, first=_draws_wide(share, seed, end // batch_size))
    mixed = np.concatenate([_take_squarest(groups, group, aspects, batch_size) for group in range(len(groups))])
    batches = np.concatenate([*groups, mixed]).reshape(-1, batch_size)
    return np.concatenate([first, batches[rng.permutation(len(batches))].reshape(-1), last])


def _draws_wide(share: float, seed: int, batch: int) -> bool:
    """Draw the orientation of a batch that two epochs share: True (wide) with probability `share`."""
    return bool(np.random.default_rng(mix_seed(seed, batch, 1)).random() < share)


def _take(groups: list[Rows], count: int, *, first: int) -> Rows:
    """Remove the first `count` images of a group, then of the other one if it runs out, and return them."""
    taken = []
    for group in (first, 1 - first):
        part, groups[group] = np.split(groups[group], [min(count, len(groups[group]))])
        taken.append(part)
        count -= len(part)
    return np.concatenate(taken)


def _take_squarest(groups: list[Rows], group: int, aspects: NDArray[np.float64], batch_size: int) -> Rows:
    """Remove from a group as many images as exceed whole batches, the squarest of its first ones, and return them."""
    count = len(groups[group]) % batch_size
    candidates = groups[group][: count + batch_size]
    chosen = np.argsort(np.abs(np.log(aspects[candidates])), kind="stable")[:count]
    taken, groups[group] = candidates[chosen], np.delete(groups[group], chosen)
    return taken
