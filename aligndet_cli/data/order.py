"""In which order the images of an epoch come, so that those of a batch fit together without much padding."""

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.data.sample import mix_seed

Rows = NDArray[np.int64]


def epoch_order(aspects: NDArray[np.float64], batch_size: int, *, seed: int, epoch: int) -> Rows:
    """A random permutation of the images in which nearly every batch holds images of one orientation.

    The images of one orientation meet at random, and the batches come in random order. What is left over of each
    orientation after whole batches makes one mixed batch: the squarest of about a batch of each, tall before wide, so
    that at most one part of it is mixed where batches are taken apart. An epoch shares a batch with the next unless it
    ends with one: both draw its orientation alike, and keep to it while they have such images. Where all images are of
    one orientation this is a plain permutation.

    Args:
        aspects: (N,) width by height; wide is what is above 1.
        batch_size: images of a step, over all processes and micro-batches; the epoch begins at the place
            `epoch * N` of the stream, and batches at its multiples.

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
    """Whether the batch that two epochs share begins and ends with wide images, as `share` of all are."""
    return bool(np.random.default_rng(mix_seed(seed, batch, 1)).random() < share)


def _take(groups: list[Rows], count: int, *, first: int) -> Rows:
    """The first `count` images of a group, and of the other if those are too few; they are removed from `groups`."""
    taken = []
    for group in (first, 1 - first):
        part, groups[group] = np.split(groups[group], [min(count, len(groups[group]))])
        taken.append(part)
        count -= len(part)
    return np.concatenate(taken)


def _take_squarest(groups: list[Rows], group: int, aspects: NDArray[np.float64], batch_size: int) -> Rows:
    """What is left over of a group after whole batches, taken from its beginning; it is removed from `groups`."""
    count = len(groups[group]) % batch_size
    candidates = groups[group][: count + batch_size]
    chosen = np.argsort(np.abs(np.log(aspects[candidates])), kind="stable")[:count]
    taken, groups[group] = candidates[chosen], np.delete(groups[group], chosen)
    return taken
