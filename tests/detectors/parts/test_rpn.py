import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.detectors.parts.rpn import RPN
from aligndet_cli.detectors.parts.sampling import Sampling

GRIDS = ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))  # of a 64 x 96 image


def build(**changes: float) -> RPN:
    torch.manual_seed(0)
    return RPN(RCNNConfig(neck_channels=8, **changes))


def make_pyramid(num_images: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_images, 8, *grid, generator=generator) for grid in GRIDS]


def targets_of(*boxes: list[list[float]]) -> list[BoxTargets]:
    return [BoxTargets(torch.tensor(rows).reshape(-1, 4), torch.zeros(len(rows), dtype=torch.int64)) for rows in boxes]


def test_losses_count_an_image_without_positives_as_having_one() -> None:
    # No boxes: all logits 0, so each anchor costs ln 2. 20 sampled in each of two images, and max(0, 1) positives
    # each: 40 ln 2 / (40 + 2).
    rpn = build()
    torch.nn.init.zeros_(rpn.objectness.weight)
    losses = rpn.losses(rpn(make_pyramid(2)), [(64, 96)] * 2, targets_of([], []), Sampling(20, 0.5))
    assert losses["loss_objectness"].item() == pytest.approx(40 * softplus(torch.zeros(())).item() / 42)
    assert losses["loss_rpn_box_reg"].item() == 0


@pytest.mark.parametrize(("x", "distance"), [(16.0, 0.0), (17.6, 0.05)])
def test_the_box_loss_is_the_distance_in_anchor_sides(x: float, distance: float) -> None:
    # The 32 x 32 anchor of the finest level at pixel (32, 32) is the box, or 1.6 px = 0.05 sides to its left.
    rpn = build(rpn_positive_iou=0.99)
    torch.nn.init.zeros_(rpn.deltas.weight)
    targets = targets_of([[x, 16, x + 32, 48]])
    _, matched = rpn.assign(list(GRIDS), [(64, 96)], targets)
    anchors = rpn.anchors(list(GRIDS))
    assert anchors[matched[0] >= 0].tolist() == [[16, 16, 48, 48]]
    losses = rpn.losses(rpn(make_pyramid(1)), [(64, 96)], targets, Sampling(10, 1.0))
    assert losses["loss_rpn_box_reg"].item() == pytest.approx(distance / 10, abs=1e-6)


def test_positives_are_limited() -> None:
    rpn = build()
    targets = targets_of([[16.0, 16, 48, 48], [30, 20, 75, 60]])
    _, matched = rpn.assign(list(GRIDS), [(64, 96)], targets)
    assert (matched >= 0).sum() > 2
    # With logits of 10 a positive costs nothing and a negative 10; 4 are sampled, of which 1 is positive.
    torch.nn.init.constant_(rpn.objectness.bias, 10.0)
    output = rpn([torch.zeros_like(level) for level in make_pyramid(1)])
    losses = rpn.losses(output, [(64, 96)], targets, Sampling(4, 0.25))
    assert losses["loss_objectness"].item() == pytest.approx(3 * 10 / 4, rel=1e-4)


def test_proposals_are_clipped_apart_and_best_first() -> None:
    rpn = build()
    torch.nn.init.normal_(rpn.objectness.weight)
    pyramid = make_pyramid(2)
    output = rpn(pyramid)
    found = rpn.propose(output, [(61, 90), (64, 70)], per_level=100, count=50)
    for boxes, (height, width) in zip(found, [(61, 90), (64, 70)], strict=True):
        assert 0 < len(boxes) <= 50
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
        assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all()
    # The very best anchor of the image comes first.
    scores = torch.cat([level[0].permute(1, 2, 0).flatten() for level in output[0]])
    best = rpn.anchors(list(GRIDS))[scores.argmax()]
    middle = (found[0][0, :2] + found[0][0, 2:]) / 2
    clipped = torch.minimum(best.clamp(min=0), torch.tensor([90.0, 61, 90, 61]))
    assert ((middle - (clipped[:2] + clipped[2:]) / 2).abs() < 4).all()


def test_only_the_best_of_a_level_become_proposals() -> None:
    rpn = build(rpn_nms_iou=1.0)
    found = rpn.propose(rpn(make_pyramid(1)), [(64, 96)], per_level=3, count=50)
    assert len(found[0]) == 5 * 3


def test_proposals_of_different_levels_do_not_suppress_each_other() -> None:
    rpn = build(rpn_nms_iou=0.0)
    for module in (rpn.deltas, rpn.objectness):
        torch.nn.init.zeros_(module.weight)
    # An NMS that lets nothing overlap leaves at least one box per level, though those of P6 cover all others.
    (boxes,) = rpn.propose(rpn(make_pyramid(1)), [(64, 96)], per_level=10, count=50)
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
    assert len(boxes) >= 5 and max(areas) == pytest.approx(64 * 96)
