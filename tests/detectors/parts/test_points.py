import pytest
import torch

from aligndet_cli.detectors.parts import points
from aligndet_cli.detectors.parts.matching import BACKGROUND
from aligndet_cli.detectors.parts.points import PointGrid, match_by_range, measure_sides

RANGES = ((-1.0, 64.0), (64.0, 128.0))


def test_points_are_the_middle_of_their_cells() -> None:
    grid = PointGrid((8, 16), RANGES)
    grids_hw = [(2, 3), (1, 2)]
    first = [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    assert grid(grids_hw).tolist() == [*first, [8, 8], [24, 8]]
    assert grid.ranges_of(grids_hw).tolist() == [[-1, 64]] * 6 + [[64, 128]] * 2


def test_sides_by_hand() -> None:
    sides = measure_sides(torch.tensor([[10.0, 20], [0, 0]]), torch.tensor([[2.0, 5, 11, 30], [2, 5, 11, 30]]))
    assert sides.tolist() == [[8, 15, 1, 10], [-2, -5, 11, 30]]


def test_ranges_include_both_ends_and_borders_are_outside() -> None:
    points = torch.tensor([[100.0, 100]]).expand(2, 2)
    ranges = torch.tensor(RANGES)
    for box, expected in (
        ([36.0, 90, 110, 110], [0, 0]),  # farthest side exactly 64: both levels
        ([36.1, 90, 110, 110], [0, BACKGROUND]),
        ([35.9, 90, 110, 110], [BACKGROUND, 0]),
        ([90.0, 90, 110, 228], [BACKGROUND, 0]),  # exactly 128
        ([90.0, 90, 110, 228.1], [BACKGROUND, BACKGROUND]),
        ([100.0, 90, 110, 110], [BACKGROUND, BACKGROUND]),  # the point lies on the left side
    ):
        assert match_by_range(points, ranges, [torch.tensor([box])]).tolist() == [expected], box


def test_the_smallest_box_wins_and_the_first_of_equals() -> None:
    points, ranges = torch.tensor([[20.0, 20]]), torch.tensor(RANGES[:1])
    big, small = [0.0, 0, 40, 40], [10.0, 10, 30, 30]
    for boxes, expected in (([big, small], 1), ([small, big], 0), ([big, small, small], 1), ([big, big], 0)):
        assert match_by_range(points, ranges, [torch.tensor(boxes)]).item() == expected


def test_many_boxes_are_matched_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = 200 * torch.rand(101, 2, generator=generator)
    boxes = torch.cat([corners, corners + 4 + 100 * torch.rand(101, 2, generator=generator)], dim=1)
    boxes[70] = boxes[7]  # a tie between two chunks: the first one has it
    grid = PointGrid((8, 16), RANGES)
    grids_hw = [(32, 32), (16, 16)]
    points, ranges = grid(grids_hw), grid.ranges_of(grids_hw)
    expected = []
    for (x, y), (low, high) in zip(points.tolist(), ranges.tolist(), strict=True):
        best, best_area = BACKGROUND, float("inf")
        for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
            sides = (x - left, y - top, right - x, bottom - y)
            area = (right - left) * (bottom - top)
            if min(sides) > 0 and low <= max(sides) <= high and area < best_area:
                best, best_area = index, area
        expected.append(best)
    (found,) = match_by_range(points, ranges, [boxes]).tolist()
    assert found == expected
    assert 7 in found and 70 not in found and len(set(found)) > 50


def test_no_boxes_no_matches() -> None:
    grid = PointGrid((8,), RANGES[:1])
    points = grid([(2, 2)])
    assert match_by_range(points, grid.ranges_of([(2, 2)]), [torch.zeros(0, 4)]).tolist() == [[BACKGROUND] * 4]


def test_images_at_once_are_matched_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = PointGrid((8, 16), RANGES)
    grids_hw = [(20, 20), (10, 10)]
    boxes = []
    for count in (40, 0, 300, 3):
        corners = 150 * torch.rand(count, 2, generator=generator)
        boxes.append(torch.cat([corners, corners + 4 + 100 * torch.rand(count, 2, generator=generator)], dim=1))
    alone = match_by_range(grid(grids_hw), grid.ranges_of(grids_hw), boxes)
    monkeypatch.setattr(points, "image_groups", lambda num, _device: [slice(0, num)])
    assert torch.equal(match_by_range(grid(grids_hw), grid.ranges_of(grids_hw), boxes), alone)
    assert (alone[1] == BACKGROUND).all() and len(alone[2].unique()) > 50
