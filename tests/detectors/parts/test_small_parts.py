"""Box coder, cells, sampling, post-processing and FPN."""

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from aligndet_cli.detectors.parts.box_coder import decode_boxes, encode_boxes
from aligndet_cli.detectors.parts.cells import gather_cells
from aligndet_cli.detectors.parts.fpn import FPN
from aligndet_cli.detectors.parts.matching import BACKGROUND, IGNORED
from aligndet_cli.detectors.parts.postprocess import select_detections
from aligndet_cli.detectors.parts.sampling import sample_positives_first


def test_offsets_by_hand() -> None:
    # Centre (5, 10) -> (10, 10), sides (10, 20) -> (20, 10): dx = 5 / 10, dy = 0, dw = ln 2, dh = -ln 2.
    offsets = encode_boxes(torch.tensor([[0.0, 5, 20, 15]]), torch.tensor([[0.0, 0, 10, 20]]))
    torch.testing.assert_close(offsets, torch.tensor([[0.5, 0, math.log(2), -math.log(2)]]))


def test_decoding_undoes_encoding_and_clips() -> None:
    boxes = torch.tensor([[3.0, 4, 30, 20], [-8, 2, 50, 90]])
    references = torch.tensor([[0.0, 0, 16, 16], [10, 10, 20, 40]])
    decoded = decode_boxes(encode_boxes(boxes, references), references, (64, 48))
    torch.testing.assert_close(decoded, torch.tensor([[3.0, 4, 30, 20], [0, 2, 48, 64]]))


def test_decoding_clamps_growth_and_shrinkage() -> None:
    # 1000 / 16 = 62.5 times larger or smaller at most: sides of 625 and 0.16 around (500, 500).
    reference = torch.tensor([[495.0, 495, 505, 505]])
    grown, shrunk = decode_boxes(
        torch.tensor([[0, 0, 99.0, 99], [0, 0, -99, -99]]), reference.repeat(2, 1), (9999, 9999)
    )
    assert (grown[2] - grown[0]).item() == pytest.approx(625, rel=1e-5)
    assert (shrunk[2] - shrunk[0]).item() == pytest.approx(0.16, rel=1e-3)


def test_gathered_cells_follow_the_order_asked_for() -> None:
    maps = [torch.arange(24.0).view(2, 2, 2, 3), 100 + torch.arange(4.0).view(2, 2, 1, 1)]
    # image 1, cell 6 = the only cell of the second map; image 0, cell 4 = row 1, column 1 of the first; ...
    found = gather_cells(maps, torch.tensor([1, 0, 1]), torch.tensor([6, 4, 0]))
    assert found.tolist() == [[102, 103], [4, 10], [12, 18]]


def test_maps_without_a_chosen_cell_get_a_zero_gradient() -> None:
    maps = [torch.zeros(1, 2, 2, 2, requires_grad=True), torch.zeros(1, 2, 1, 1, requires_grad=True)]
    empty = torch.zeros(0, dtype=torch.int64)
    gather_cells(maps, empty, empty).sum().backward()
    assert all(level.grad is not None and not level.grad.any() for level in maps)


def test_sampling_takes_positives_first() -> None:
    matched = torch.tensor([BACKGROUND, 3, IGNORED, BACKGROUND, 0, BACKGROUND])
    assert sample_positives_first(matched, 100).tolist() == [1, 4, 0, 3, 5]
    three = sample_positives_first(matched, 3).tolist()
    assert three[:2] == [1, 4] and three[2] in (0, 3, 5)
    assert set(sample_positives_first(matched, 1).tolist()) < {1, 4}


def test_sampling_limits_the_share_of_positives() -> None:
    matched = torch.tensor([0, 1, 2, BACKGROUND, BACKGROUND, BACKGROUND, 3, IGNORED])
    chosen = sample_positives_first(matched, 5, positive_fraction=0.5).tolist()  # 2 of 4 positives, all background
    assert set(chosen[:2]) < {0, 1, 2, 6} and sorted(chosen[2:]) == [3, 4, 5]


def test_sampling_is_uniform() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[sample_positives_first(torch.full((10,), BACKGROUND), 3)] += 1
    # 600 expected each, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5
    assert (counts - 600).abs().max() < 5 * 20.5


def test_nms_is_per_class_and_sorted() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [50, 50, 60, 60]])
    scores, class_ids = torch.tensor([0.5, 0.6, 0.7, 0.1]), torch.tensor([0, 0, 1, 0])
    found = select_detections(boxes, scores, class_ids, nms_iou=0.5, max_detections=100)
    torch.testing.assert_close(found.scores, torch.tensor([0.7, 0.6, 0.1]))
    assert found.class_ids.tolist() == [1, 0, 0]
    assert len(select_detections(boxes, scores, class_ids, nms_iou=0.5, max_detections=2).scores) == 2


@pytest.mark.parametrize("extra", ["from_c5", "from_p5"])
@pytest.mark.parametrize(
    ("norm", "num_norms", "has_bias"), [("none", 0, True), ("batch", 8, False), ("group", 8, False)]
)
def test_fpn_norms_every_convolution_or_none(norm: str, num_norms: int, has_bias: bool, extra: str) -> None:
    fpn = FPN({"c3": 3, "c4": 5, "c5": 7}, 32, norm, extra_levels=extra)
    convs = [module for module in fpn.modules() if isinstance(module, torch.nn.Conv2d)]
    norms = [module for module in fpn.modules() if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm)]
    assert (len(convs), len(norms)) == (8, num_norms)
    assert all((conv.bias is not None) == has_bias for conv in convs)
    maps = {"c2": torch.zeros(2, 1, 16, 24), "c3": torch.randn(2, 3, 8, 12), "c4": torch.randn(2, 5, 4, 6)}
    sizes = [tuple(level.shape) for level in fpn({**maps, "c5": torch.randn(2, 7, 2, 3)})]
    assert sizes == [(2, 32, 8, 12), (2, 32, 4, 6), (2, 32, 2, 3), (2, 32, 1, 2), (2, 32, 1, 1)]


def test_a_pooled_level_is_every_other_cell_of_p5() -> None:
    fpn = FPN({"c4": 3, "c5": 5}, 4, "batch", extra_levels="pooled")
    assert sum(isinstance(module, torch.nn.Conv2d) for module in fpn.modules()) == 4
    _, p5, p6 = fpn({"c4": torch.randn(2, 3, 6, 10), "c5": torch.randn(2, 5, 3, 5)})
    assert torch.equal(p6, p5[:, :, ::2, ::2])


@pytest.mark.parametrize(("extra", "p6_is", "p7_is"), [("from_c5", -1, -1), ("from_p5", -3, 0)])
def test_extra_levels_come_from_where_they_should(extra: str, p6_is: int, p7_is: int) -> None:
    # C5 is -1, the lateral triples it and all else copies. Of C5: P6 = P7 = -1. Of P5 = -3: P7 = relu(P6) = 0.
    fpn = FPN({"c5": 1}, 1, "none", extra_levels=extra)
    for conv in (module for module in fpn.modules() if isinstance(module, torch.nn.Conv2d)):
        torch.nn.init.zeros_(conv.weight)
        conv.weight.data[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
    fpn.pyramid.inner_blocks[0][0].weight.data *= 3
    p5, p6, p7 = fpn({"c5": torch.full((1, 1, 4, 4), -1.0)})
    assert (p5.unique().tolist(), p6.unique().tolist(), p7.unique().tolist()) == ([-3], [p6_is], [p7_is])


def test_focal_loss_of_torchvision_is_the_papers() -> None:
    # p = 0.2 and a positive: -0.25 * 0.8^2 * ln 0.2; the same p and a negative: -0.75 * 0.2^2 * ln 0.8.
    logit = torch.full((2,), math.log(0.2 / 0.8))
    loss = sigmoid_focal_loss(logit, torch.tensor([1.0, 0.0]), alpha=0.25, gamma=2)
    expected = [-0.25 * 0.64 * math.log(0.2), -0.75 * 0.04 * math.log(0.8)]
    torch.testing.assert_close(loss, torch.tensor(expected))
