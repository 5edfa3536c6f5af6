"""Suppression on a CPU equals torchvision's to the bit."""

import pytest
import torch
import torchvision.ops
from torch import Tensor

from aligndet_cli.detectors.parts import suppression
from aligndet_cli.detectors.parts.suppression import batched_nms


def drawn(num: int, *, sides: float, whole: bool) -> Tensor:
    """(num, 4) xyxy boxes in and around an image of 256 pixels; `whole` ones meet the limits exactly."""
    corner, size = torch.rand(num, 2) * 300 - 20, torch.rand(num, 2) * sides
    boxes = torch.cat([corner, corner + size], dim=1)
    return (boxes / 8).round() * 8 if whole else boxes


@pytest.mark.parametrize("num", [1, 2, 17, 999, 1000, 1001, 2500])
@pytest.mark.parametrize("num_groups", [1, 5, 80])
@pytest.mark.parametrize("limit", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_it_equals_torchvisions(num: int, num_groups: int, limit: float) -> None:
    torch.manual_seed(num)
    for sides, whole, shades in ((40.0, True, 9), (160.0, False, 50), (90.0, True, 1 << 24)):
        boxes = drawn(num, sides=sides, whole=whole)  # some without area
        scores = torch.randint(0, shades, (num,)) / shades  # equal ones, too
        groups = torch.randint(-1, num_groups, (num,))
        ours, theirs = (f(boxes, scores, groups, limit) for f in (batched_nms, torchvision.ops.batched_nms))
        assert torch.equal(ours, theirs)


def test_it_is_the_compiled_loop_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.ops, "batched_nms", None)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 0, 60, 10]])
    scores, groups = torch.tensor([0.9, 0.8, 0.7, 0.95]), torch.tensor([0, 0, 1, 0])
    assert batched_nms(boxes, scores, groups, 0.85).tolist() == [3, 0, 2]


def test_no_boxes_leave_none() -> None:
    none = torch.zeros(0)
    assert batched_nms(none.reshape(0, 4), none, none.long(), 0.5).shape == (0,)


def test_a_traced_network_keeps_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suppression, "_keep", None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    boxes, scores = drawn(20, sides=90, whole=False), torch.rand(20)
    groups = torch.zeros(20, dtype=torch.int64)
    assert torch.equal(batched_nms(boxes, scores, groups, 0.5), torchvision.ops.nms(boxes, scores, 0.5))
