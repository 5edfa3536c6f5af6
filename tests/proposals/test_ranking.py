import cv2
import numpy as np
import pytest

from aligndet_cli.proposals.grouping import Groups
from aligndet_cli.proposals.ranking import WEIGHTS, box_keys, describe_boxes, look_around, num_similar, ranked

SMALL, LARGE = [10, 10, 20, 20], [30, 10, 60, 50]


def groups(*rows: tuple[list[int], float, float]) -> Groups:
    """Groups from (box, fill, contrast)."""
    boxes, fills, contrasts = zip(*rows, strict=True)
    return Groups(*(np.array(column, dtype=np.float32) for column in (boxes, fills, contrasts)))


@pytest.fixture
def flat() -> np.ndarray:
    """Edge strength of an image of 100 x 100 pixels without edges."""
    return np.zeros((100, 100), dtype=np.float32)


def test_what_is_found_more_often_counts_more():
    """Times of the box itself, of the one that covers 0.8 of it, but not of those that cover 0.6 or lie apart."""
    boxes = np.array([[0, 0, 6, 10], [0, 0, 8, 10], [0, 0, 10, 10], [20, 0, 30, 10]], dtype=np.float32)
    times = np.array([5, 3, 2, 7], dtype=np.int32)
    # IoU: 6/8 = 0.75 between the first two, 0.8 between the next two, 0.6 from the first to the third.
    assert num_similar(*boxes.T.copy(), times, 0.7).tolist() == [8, 10, 5, 7]


def test_each_box_is_given_out_once_with_the_best_of_its_finds(flat):
    found = [groups((SMALL, 0.5, 0.1), (LARGE, 0.4, 0.4)), groups((SMALL, 0.2, 0.7))]
    boxes, cues = describe_boxes(found, flat)
    order = boxes[:, 0].argsort()
    np.testing.assert_array_equal(boxes[order], [SMALL, LARGE])
    np.testing.assert_allclose(cues["fill"][order], [0.5, 0.4])
    np.testing.assert_allclose(cues["contrast"][order], [0.7, 0.4])
    np.testing.assert_allclose(cues["area"][order], np.log([100, 1200]), rtol=1e-6)
    np.testing.assert_allclose(cues["agreement"][order], np.log([2, 1]), rtol=1e-6)
    assert cues.keys() == WEIGHTS.keys()


def test_edges_are_looked_for_in_a_ring_around_the_box():
    strength = np.zeros((50, 60), dtype=np.float32)
    strength[10:30, 18] = 1.0  # two columns left of the box, in the ring of 0.1 of its width
    strength[20, 25] = 1.0  # inside
    strength[0, 0] = 1.0  # far off
    boxes = np.array([[20, 10, 40, 30], [0, 0, 60, 50], [0, 30, 10, 50]], dtype=np.float32)
    around, sides = look_around(boxes, cv2.integral(strength), 0.1)
    # 20 of the 24 * 24 - 20 * 20 pixels of the ring; nothing is around the whole image.
    np.testing.assert_allclose(around, [20 / 176, 0, 0], rtol=1e-6)
    assert sides.tolist() == [0, 4, 2]


def test_the_order_follows_the_cues(flat):
    """Each time two boxes that differ in one thing, the better one first."""

    def first(found: list[Groups], strength: np.ndarray = flat) -> list[float]:
        return ranked(found, strength)[0].tolist()

    same = [coordinate + 40 for coordinate in SMALL]
    assert first([groups((SMALL, 0.5, 0.5), (LARGE, 0.5, 0.5))]) == LARGE
    assert first([groups((SMALL, 0.5, 0.5), (same, 0.6, 0.5))]) == same
    assert first([groups((SMALL, 0.5, 0.5), (same, 0.5, 0.6))]) == same
    assert first([groups((SMALL, 0.5, 0.5), (same, 0.5, 0.5)), groups((same, 0.5, 0.5))]) == same
    cluttered = flat.copy()
    cluttered[8:22, 9] = 1
    assert first([groups((SMALL, 0.5, 0.5), (same, 0.5, 0.5))], cluttered) == same
    assert first([groups(([0, 10, 10, 20], 0.5, 0.5), (same, 0.5, 0.5))]) == same


def test_equal_boxes_come_in_the_order_of_their_coordinates(flat):
    shifted = [[x + 30, y, x + 40, y + 10] for x in (0, 20) for y in (60, 30)]
    found = groups(*((box, 0.5, 0.5) for box in shifted))
    expected = np.array(shifted, np.float32)[box_keys(np.array(shifted, np.float32)).argsort()]
    np.testing.assert_array_equal(ranked([found], flat), expected)
