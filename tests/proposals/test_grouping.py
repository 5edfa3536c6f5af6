import numpy as np
import pytest

from aligndet_cli.proposals.grouping import Mix, group, group_alone
from aligndet_cli.proposals.regions import HISTOGRAM_UNIT, describe_regions

# Four columns of a 4 x 8 image, two pixels wide each, in gray levels 0, 1, 8 and 9.
LABELS = np.tile(np.repeat(np.arange(4, dtype=np.int32), 2), (4, 1))
CODES = np.tile(np.repeat(np.array([0, 1, 8, 9], dtype=np.uint8), 2), (4, 1))[:, :, None]


def strength_of(*borders: float) -> np.ndarray:
    """(4, 8) float32 edge strength with the given values at the three borders between the columns."""
    strength = np.zeros((4, 8), dtype=np.float32)
    for number, value in enumerate(borders):
        strength[:, 2 * number + 1] = value
    return strength


@pytest.fixture
def columns():
    return describe_regions(LABELS, CODES, 16, strength_of(0.1, 0.9, 0.2))


def test_regions_are_described(columns):
    np.testing.assert_array_equal(columns.sizes, [8, 8, 8, 8])
    np.testing.assert_array_equal(columns.boxes, [[0, 0, 2, 4], [2, 0, 4, 4], [4, 0, 6, 4], [6, 0, 8, 4]])
    np.testing.assert_array_equal(columns.ends, [[0, 1], [1, 2], [2, 3]])
    np.testing.assert_array_equal(columns.lengths, [4, 4, 4])
    np.testing.assert_allclose(columns.strengths, [0.4, 3.6, 0.8], rtol=1e-6)
    assert (columns.histograms.argmax(axis=1) == [0, 1, 8, 9]).all()
    assert (columns.histograms.sum(axis=1) == HISTOGRAM_UNIT).all()


def test_weakest_border_is_joined_first(columns):
    found = group(columns, Mix(border=1), 32)
    np.testing.assert_array_equal(found.boxes, [[0, 0, 4, 4], [4, 0, 8, 4], [0, 0, 8, 4]])
    np.testing.assert_array_equal(found.fills, [1, 1, 1])
    # Between the two pairs the edge is 0.9 and no colour is shared; around everything there is nothing.
    np.testing.assert_allclose(found.contrasts, [0.95, 0.95, 1], atol=1e-6)


def test_regions_alone(columns):
    found = group_alone(columns)
    np.testing.assert_array_equal(found.boxes, columns.boxes)
    np.testing.assert_array_equal(found.fills, [1, 1, 1, 1])
    # No colours are shared; of the edges of a column (0.1, 0.9 and 0.2) the weaker one counts.
    np.testing.assert_allclose(found.contrasts, [0.55, 0.55, 0.6, 0.6], atol=1e-6)
    assert len(group_alone(columns, min_side=2.5).boxes) == 0


def test_shared_colours_lessen_the_contrast():
    codes = CODES.copy()
    codes[:2, 4:6] = 1  # half of the third column looks like the second
    found = group_alone(describe_regions(LABELS, codes, 16, strength_of(0, 0, 0)))
    np.testing.assert_allclose(found.contrasts, [0.5, 0.25, 0.25, 0.5], atol=1e-6)


def test_part_of_the_box_that_is_filled():
    """An L of three quarters of its box, a square inside the corner, and the joined two."""
    labels = np.zeros((8, 8), dtype=np.int32)
    labels[:4, 4:] = 1
    regions = describe_regions(labels, np.zeros((8, 8, 1), np.uint8), 16, np.zeros((8, 8), np.float32))
    np.testing.assert_array_equal(group_alone(regions).fills, [0.75, 1])
    np.testing.assert_array_equal(group(regions, Mix(size=1), 64).fills, [1])


def test_small_regions_are_joined_first():
    labels = LABELS.copy()
    labels[2:, 4:6] = 3  # sizes 8, 8, 4, 12
    regions = describe_regions(labels, CODES, 16, strength_of(0, 0, 0))
    found = group(regions, Mix(size=1), 32)
    # 8 + 4 = 12 pixels is the least of {16, 12, 20, 16}: columns 1 and 2.
    np.testing.assert_array_equal(found.boxes[0], [2, 0, 6, 4])


def test_common_colours_are_joined_first():
    codes = CODES.copy()
    codes[:2, 4:6] = 1  # half of the third column looks like the second
    found = group(describe_regions(LABELS, codes, 16, strength_of(0, 0, 0)), Mix(colour=1), 32)
    np.testing.assert_array_equal(found.boxes[0], [2, 0, 6, 4])


def test_holes_are_filled_first():
    labels = np.zeros((6, 12), dtype=np.int32)
    labels[:, 6:] = 1
    labels[2:4, 2:4] = 2  # inside region 0
    codes = np.zeros((6, 12, 1), dtype=np.uint8)
    found = group(describe_regions(labels, codes, 16, np.zeros((6, 12), np.float32)), Mix(fill=1), 72)
    np.testing.assert_array_equal(found.boxes, [[0, 0, 6, 6], [0, 0, 12, 6]])


def test_large_regions_are_given_up_last():
    """Equal borders and colours: what decides is the size of the smaller one, even beside a huge one."""
    labels = np.zeros((4, 32), dtype=np.int32)
    labels[:, 20:28], labels[:, 28:] = 1, 2  # 80, 32 and 16 pixels
    codes = labels[:, :, None].astype(np.uint8)
    strength = np.zeros((4, 32), dtype=np.float32)
    strength[:, 20], strength[:, 28] = 0.5, 0.5
    found = group(describe_regions(labels, codes, 16, strength), Mix(effort=1), labels.size)
    np.testing.assert_array_equal(found.boxes[0], [20, 0, 32, 4])


def test_pairs_of_neighbours_are_given_out_once_for_a_number_of_regions(columns):
    found = group(columns, Mix(border=1), 32, pairs_at=(4, 3))
    # Four regions: three pairs. Then columns 0 and 1 are joined, and three regions have two pairs.
    expected = [
        [0, 0, 4, 4],
        [2, 0, 6, 4],
        [4, 0, 8, 4],
        [0, 0, 4, 4],
        [0, 0, 6, 4],
        [4, 0, 8, 4],
        [4, 0, 8, 4],
        [0, 0, 8, 4],
    ]
    np.testing.assert_array_equal(found.boxes, expected)
    # A pair has the weaker contrast of its two: columns 0 | 1 | 2 | 3 have edges of 0.1, 0.9 and 0.2. Once two are
    # joined, 0.9 and 0.2 are left, and 0.9 between the last two.
    np.testing.assert_allclose(found.contrasts, [0.55, 0.55, 0.6, 0.95, 0.6, 0.6, 0.95, 1], atol=1e-6)


def test_short_boxes_are_not_given_out(columns):
    assert len(group(columns, Mix(border=1), 32, pairs_at=(4,), min_side=4.5).boxes) == 0
    np.testing.assert_array_equal(group(columns, Mix(border=1), 32, min_side=4).boxes[0], [0, 0, 4, 4])


def test_regions_stay_as_they_are(columns):
    before = [np.copy(array) for array in columns]
    group(columns, Mix(colour=1, size=1, fill=1, border=1, effort=1), 32)
    for array, copy in zip(columns, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_single_region_has_no_groups():
    regions = describe_regions(np.zeros((4, 8), np.int32), CODES, 16, strength_of(0, 0, 0))
    assert len(group(regions, Mix(size=1), 32, pairs_at=(1,)).boxes) == 0


def test_matches_grouping_by_search_over_all_pairs():
    """A grid of 48 random tiles, against the same rule spelled out with sets of tiles."""
    rng = np.random.default_rng(8)
    labels = np.arange(48, dtype=np.int32).reshape(6, 8).repeat(3, axis=0).repeat(4, axis=1)
    strength = rng.random(labels.shape).astype(np.float32)
    regions = describe_regions(labels, np.zeros((*labels.shape, 1), np.uint8), 16, strength)
    found = group(regions, Mix(border=1, size=0.5), labels.size)

    groups = {number: {number} for number in range(48)}
    borders = {
        frozenset(pair): (length, total)
        for pair, length, total in zip(regions.ends.tolist(), regions.lengths, regions.strengths, strict=True)
    }
    expected = []
    while len(groups) > 1:

        def alike(first: int, second: int) -> float:
            shared = [borders.get(frozenset((a, b)), (0, 0)) for a in groups[first] for b in groups[second]]
            length, total = (sum(float(part[kind]) for part in shared) for kind in range(2))
            size = 12 * (len(groups[first]) + len(groups[second]))
            return 1 - total / length + 0.5 * (1 - size / labels.size) if length else -1.0

        pairs = [(a, b) for a in groups for b in groups if a < b]
        first, second = max(pairs, key=lambda pair: alike(*pair))
        groups[first] |= groups.pop(second)
        boxes = regions.boxes[sorted(groups[first])]
        expected.append([*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)])
    np.testing.assert_array_equal(found.boxes, expected)
