import itertools

import pytest
import torch
from torch import Tensor

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts.hungarian import MatchCosts, match_queries, to_relative

COSTS = MatchCosts(class_weight=1.0, box_weight=5.0, giou_weight=2.0)
SIZE_HW = (50, 200)


def targets_of(*boxes: tuple[float, ...], class_ids: tuple[int, ...] | None = None) -> BoxTargets:
    ids = class_ids if class_ids is not None else (0,) * len(boxes)
    return BoxTargets(torch.tensor(boxes).reshape(-1, 4), torch.tensor(ids, dtype=torch.int64))


def test_relative_boxes() -> None:
    # centre (60, 20) and sides 40 x 20 of an image 200 wide and 50 high
    boxes = to_relative(torch.tensor([[40.0, 10, 80, 30]]), SIZE_HW)
    torch.testing.assert_close(boxes, torch.tensor([[0.3, 0.4, 0.2, 0.4]]))


def test_each_box_goes_to_the_query_that_found_it() -> None:
    target = targets_of((40, 10, 80, 30), (100, 0, 200, 50))
    found = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.75, 0.5, 0.5, 1.0], [0.3, 0.4, 0.2, 0.4]])
    matched = match_queries(torch.zeros(1, 1, 3, 2), found[None, None], [target], [SIZE_HW], COSTS)
    assert matched.tolist() == [[[-1, 1, 0]]]


def test_the_class_decides_between_equal_boxes() -> None:
    target = targets_of((40, 10, 80, 30), (40, 10, 80, 30), class_ids=(1, 0))
    found = torch.tensor([0.3, 0.4, 0.2, 0.4]).expand(1, 1, 2, 4)
    logits = torch.tensor([[5.0, 0, 0], [0, 5.0, 0]])  # query 0 says class 0, query 1 class 1
    assert match_queries(logits[None, None], found, [target], [SIZE_HW], COSTS).tolist() == [[[1, 0]]]


def test_indices_count_the_boxes_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = [targets_of((40, 10, 80, 30), (100, 0, 200, 50)), targets_of(), targets_of((0, 0, 20, 20))]
    matched = match_queries(
        torch.randn(2, 3, 4, 3, generator=generator),
        torch.rand(2, 3, 4, 4, generator=generator),
        targets,
        [SIZE_HW] * 3,
        COSTS,
    )
    assert matched.shape == (2, 3, 4)
    for layer in matched:
        assert [sorted(i for i in image.tolist() if i >= 0) for image in layer] == [[0, 1], [], [2]]


def test_more_boxes_than_queries_leaves_boxes_over() -> None:
    target = targets_of((40, 10, 80, 30), (100, 0, 200, 50), (0, 0, 20, 20))
    found = torch.tensor([[0.75, 0.5, 0.5, 1.0], [0.3, 0.4, 0.2, 0.4]])
    assert match_queries(torch.zeros(1, 1, 2, 2), found[None, None], [target], [SIZE_HW], COSTS).tolist() == [[[1, 0]]]


def giou(first: Tensor, second: Tensor) -> float:
    """Of two xyxy boxes, by its definition."""
    sides = (torch.minimum(first[2:], second[2:]) - torch.maximum(first[:2], second[:2])).clamp(min=0)
    hull = (torch.maximum(first[2:], second[2:]) - torch.minimum(first[:2], second[:2])).prod()
    union = (first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - sides.prod()
    return float(sides.prod() / union - (hull - union) / hull)


def test_no_other_assignment_is_cheaper() -> None:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(3, 2, generator=generator) * torch.tensor([120.0, 20.0])
    boxes = torch.cat([corners, corners + 10 + 15 * torch.rand(3, 2, generator=generator)], dim=1)
    target = BoxTargets(boxes, torch.tensor([2, 0, 1]))
    logits, found = torch.randn(4, 4, generator=generator), 0.2 + 0.4 * torch.rand(4, 4, generator=generator)
    height, width = SIZE_HW
    scale = torch.tensor([width, height, width, height])

    def cost(query: int, box: int) -> float:
        relative = to_relative(boxes[box : box + 1], SIZE_HW)[0]
        centre, sides = found[query, :2], found[query, 2:]
        predicted = torch.cat([centre - sides / 2, centre + sides / 2]) * scale
        probability = logits[query].softmax(0)[target.class_ids[box]]
        distance = (found[query] - relative).abs().sum()
        return float(5 * distance - probability) - 2 * giou(predicted, boxes[box])

    cheapest = min(itertools.permutations(range(4), 3), key=lambda qs: sum(cost(q, b) for b, q in enumerate(qs)))
    matched = match_queries(logits[None, None], found[None, None], [target], [SIZE_HW], COSTS)[0, 0]
    assert [matched.tolist().index(box) for box in range(3)] == list(cheapest)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_do_not_stop_the_matching(bad: float) -> None:
    # The loop reports a loss that is not finite, with step and images; it has to get that far.
    target = targets_of((40, 10, 80, 30), (100, 0, 200, 50))
    logits, found = torch.full((1, 1, 3, 2), bad), torch.full((1, 1, 3, 4), bad)
    matched = match_queries(logits, found, [target], [SIZE_HW], COSTS)
    assert sorted(matched.flatten().tolist()) == [-1, 0, 1]
