"""The images of a batch fit together, and every epoch has every image once."""

from collections import Counter

import numpy as np
import pytest

from aligndet_cli.data.order import epoch_order
from aligndet_cli.data.transforms import resized_hw
from aligndet_cli.tools.bench.images import mixed_sizes


def aspects_of(num_tall: int, num_wide: int) -> np.ndarray:
    """Return width / height (N,): tall images (0.5..1) first, then wide ones (1..2)."""
    return np.concatenate([np.linspace(0.5, 1, num_tall), np.linspace(2, 1, num_wide, endpoint=False)])


def stream(aspects: np.ndarray, batch_size: int, num_epochs: int, seed: int = 0) -> np.ndarray:
    """Return rows (batches, batch_size) of the whole batches."""
    epochs = [epoch_order(aspects, batch_size, seed=seed, epoch=epoch) for epoch in range(num_epochs)]
    rows = np.concatenate(epochs)
    return rows[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)


@pytest.mark.parametrize(("num_tall", "num_wide"), [(36, 92), (31, 70), (2, 99), (0, 13), (13, 0), (1, 1), (5, 6)])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 16, 50])
def test_every_epoch_has_every_image_once(num_tall: int, num_wide: int, batch_size: int) -> None:
    aspects = aspects_of(num_tall, num_wide)
    for epoch in range(9):
        order = epoch_order(aspects, batch_size, seed=3, epoch=epoch)
        assert order.dtype == np.int64 and sorted(order) == list(range(len(aspects)))
        assert np.array_equal(order, epoch_order(aspects, batch_size, seed=3, epoch=epoch))


@pytest.mark.parametrize(("num_tall", "num_wide"), [(36, 92), (31, 70), (48, 80), (37, 1000)])
@pytest.mark.parametrize("batch_size", [2, 8, 16])
def test_at_most_one_batch_of_an_epoch_is_mixed(num_tall: int, num_wide: int, batch_size: int) -> None:
    """An epoch may begin and end anywhere in a batch: there are enough images of both orientations here."""
    aspects, num_epochs = aspects_of(num_tall, num_wide), 20
    is_wide = aspects[stream(aspects, batch_size, num_epochs)] > 1
    is_mixed = is_wide.any(axis=1) & ~is_wide.all(axis=1)
    assert is_mixed.sum() <= num_epochs
    if not num_tall % batch_size and not num_wide % batch_size:
        assert not is_mixed.any()
    # Tall before wide: of the halves and quarters of a mixed batch at most one is mixed itself.
    for parts in (2, 4):
        if batch_size % parts == 0:
            halves = is_wide[is_mixed].reshape(-1, parts, batch_size // parts)
            assert ((halves.any(axis=2) & ~halves.all(axis=2)).sum(axis=1) <= 1).all()


def test_a_batch_of_two_epochs_is_of_one_orientation() -> None:
    # 31 + 40 images: 71 = 4 * 16 + 7, so that each epoch begins 7 images further on in a batch; at most 30 are shared.
    aspects = aspects_of(31, 40)
    for seed in range(5):
        is_wide = aspects[stream(aspects, 16, 16, seed)] > 1
        shared = np.array([epoch * 71 // 16 for epoch in range(1, 16)])
        assert all(batch.all() or not batch.any() for batch in is_wide[shared])
        assert {batch.all() for batch in is_wide[shared]} == {True, False}


def test_what_is_left_over_is_nearly_square() -> None:
    """36 + 92 images in batches of 16 leave 4 tall and 12 wide ones."""
    aspects = aspects_of(36, 92)
    batches = aspects[stream(aspects, 16, 8 * 10)]
    [mixed] = [batches[(batches > 1).any(axis=1) & (batches <= 1).any(axis=1)]]
    assert len(mixed) == 80 and ((mixed > 1).sum(axis=1) == 12).all()
    # The squarest 4 of 20, and 12 of 28: on average nearer to 1 than all are, whose mean is 0.75 and 1.5.
    assert mixed[mixed <= 1].mean() > 0.9 and mixed[mixed > 1].mean() < 1.3


def test_padding_is_a_third_of_what_it_was() -> None:
    """Padded by content pixels of 128 images in COCO's mix of sizes, 16 a batch, short side 800, long side 1333."""
    sizes_hw = np.array([resized_hw(size_hw, 800, 1333) for size_hw in mixed_sizes(128)])
    aspects = sizes_hw[:, 1] / sizes_hw[:, 0]
    found = {}
    for name, known in (("plain", np.ones(128)), ("grouped", aspects)):
        batches = sizes_hw[stream(known, 16, 20)]  # (B, 16, 2)
        padded = np.ceil(batches.max(axis=1) / 32) * 32
        found[name] = 16 * padded.prod(axis=1).sum() / batches.prod(axis=2).sum()
    assert found["plain"] > 1.7 and found["grouped"] < 1.25


def test_any_two_images_of_an_orientation_meet() -> None:
    """100 + 100 images in batches of 10: two of one orientation meet in 9 of 99 epochs, as by chance."""
    aspects, num_epochs = aspects_of(100, 100), 300
    met = np.zeros((200, 200), dtype=int)
    for batch in stream(aspects, 10, num_epochs):
        met[np.ix_(batch, batch)] += 1
    pairs = met[:100, :100][np.triu_indices(100, 1)]
    # Binomial with p = 1/11: 27.3 +- 5.0; of 4,950 pairs the extremes lie within 5 deviations.
    assert abs(pairs.mean() - 300 / 11) < 1e-9 and pairs.min() >= 3 and pairs.max() <= 52
    assert met[:100, 100:].sum() == 0


def test_batches_of_both_orientations_come_at_any_time() -> None:
    aspects = aspects_of(80, 80)
    first = Counter(bool(aspects[epoch_order(aspects, 16, seed=seed, epoch=0)[0]] > 1) for seed in range(200))
    assert 70 < first[True] < 130


def test_images_of_one_orientation_are_in_the_order_of_a_plain_permutation() -> None:
    """Runs on such data, or with square views, keep the order that they had before images were grouped."""
    orders = [epoch_order(aspects, 4, seed=5, epoch=1) for aspects in (np.ones(9), np.full(9, 0.5), np.full(9, 1.5))]
    assert all(np.array_equal(order, orders[0]) for order in orders)
    assert not np.array_equal(orders[0], epoch_order(np.ones(9), 4, seed=5, epoch=2))
    assert not np.array_equal(orders[0], epoch_order(np.ones(9), 4, seed=6, epoch=1))
