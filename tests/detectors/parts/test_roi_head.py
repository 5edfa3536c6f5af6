import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.detectors.parts.roi_head import BoxHead, pool_rois, sample_rois, to_rois
from aligndet_cli.detectors.parts.sampling import Sampling
from helpers.host_reads import host_reads, shown


def square(side: float, x: float = 10.0, y: float = 20.0) -> list[float]:
    return [x, y, x + side, y + side]


def make_pyramid() -> list[Tensor]:
    """Level l is all l + 1, so that pooled features tell where they come from."""
    return [torch.full((2, 3, 512 // stride, 512 // stride), float(i + 1)) for i, stride in enumerate((4, 8, 16, 32))]


@pytest.mark.parametrize(
    # 56 px at stride 4 is the smallest of each kind: sides from 56 * 2^l on belong to level l, the ends take the rest
    ("side", "level"),
    [(1, 1), (56, 1), (111.9, 1), (112.1, 2), (223, 2), (225, 3), (447, 3), (449, 4), (480, 4)],
)
def test_level_by_size(side: float, level: int) -> None:
    pooled, row = pool_rois(make_pyramid(), to_rois([torch.tensor([square(side)]), torch.zeros(0, 4)]), 2, RCNNConfig())
    assert row.tolist() == [0]
    assert pooled.unique().tolist() == [level]


def test_rows_lead_back_to_the_rois() -> None:
    sides = [300.0, 20.0, 130.0, 60.0, 460.0, 10.0]
    boxes = torch.tensor([square(side) for side in sides])
    pooled, row = pool_rois(make_pyramid(), to_rois([boxes[:2], boxes[2:]]), 2, RCNNConfig())
    assert pooled[row][:, 0, 0, 0].tolist() == [3, 1, 2, 1, 4, 1]


def test_pooling_is_roi_align_on_the_level_of_the_image() -> None:
    pyramid = [torch.randn(2, 3, 64 // 2**i, 64 // 2**i) for i in range(4)]
    box = torch.tensor([[13.0, 21.0, 140.0, 150.0]])  # side 128: stride 8
    pooled, _ = pool_rois(pyramid, to_rois([torch.zeros(0, 4), box]), 7, RCNNConfig())
    expected = roi_align(pyramid[1][1:], [box], 7, 1 / 8, sampling_ratio=0, aligned=True)
    torch.testing.assert_close(pooled, expected)


def test_every_level_gets_a_gradient_without_any_roi() -> None:
    pyramid = [level.requires_grad_() for level in make_pyramid()]
    head = BoxHead(RCNNConfig(neck_channels=3, head_convs=1, pool_size=2, head_features=5))
    pooled, row = pool_rois(pyramid, to_rois([torch.zeros(0, 4)] * 2), 2, RCNNConfig())
    head(pooled)[row].sum().backward()
    assert all(level.grad is not None and not level.grad.any() for level in pyramid)
    assert all(parameter.grad is not None for parameter in head.parameters())


BOXES = torch.tensor([[0.0, 0, 40, 40], [100, 100, 140, 140]])
# IoU with the first box: 1, 0.75, 0.25 and 0; with the second: 0, 0, 0 and 0.5
PROPOSALS = torch.tensor([[0.0, 0, 40, 40], [0, 0, 40, 30], [0, 0, 40, 10], [100, 100, 140, 120]])


def sample(num: int, fraction: float, *, only_positives: bool, boxes: Tensor = BOXES) -> tuple[list, list]:
    target = BoxTargets(boxes, torch.zeros(len(boxes), dtype=torch.int64))
    samples = sample_rois(
        [PROPOSALS],
        [target],
        positive_iou=0.5,
        sampling=Sampling(num, fraction),
        only_positives=only_positives,
    )
    return samples.boxes[0].tolist(), samples.matched[0].tolist()


def test_boxes_come_first_then_proposals_then_background() -> None:
    boxes, matched = sample(100, 1.0, only_positives=False)
    assert matched == [0, 1, 0, 0, 1, -1]
    assert boxes == [*BOXES.tolist(), *PROPOSALS[[0, 1, 3, 2]].tolist()]


def test_the_pretext_takes_no_background() -> None:
    assert sample(100, 1.0, only_positives=True)[1] == [0, 1, 0, 0, 1]


def test_the_number_and_share_of_positives_is_limited() -> None:
    _, matched = sample(8, 0.25, only_positives=False)
    assert len(matched) == 3 and sum(m >= 0 for m in matched) == 2  # and the one background there is
    assert len(sample(3, 1.0, only_positives=True)[1]) == 3


def test_an_image_without_boxes_is_background() -> None:
    assert sample(100, 0.25, only_positives=False, boxes=torch.zeros(0, 4))[1] == [-1] * 4
    assert sample(100, 1.0, only_positives=True, boxes=torch.zeros(0, 4))[1] == []


def test_images_may_have_different_numbers_of_proposals() -> None:
    targets = [BoxTargets(boxes, torch.zeros(len(boxes), dtype=torch.int64)) for boxes in (BOXES[:1], BOXES)]
    rules = {"positive_iou": 0.5, "sampling": Sampling(100, 1.0), "only_positives": False}
    samples = sample_rois([PROPOSALS[1:3], PROPOSALS], targets, **rules)
    assert [matched.tolist() for matched in samples.matched] == [[0, 0, -1], [0, 1, 0, 0, 1, -1]]
    positives = samples.positives()
    assert [matched.tolist() for matched in positives.matched] == [[0, 0], [0, 1, 0, 0, 1]]
    assert [is_box.tolist() for is_box in positives.is_box] == [[True, False], [True, True, False, False, False]]
    assert torch.equal(torch.cat(positives.boxes), samples.positive_rows(torch.cat(samples.boxes)))


@pytest.mark.parametrize("only_positives", [False, True])
def test_the_host_waits_once_for_all_images(only_positives: bool) -> None:
    target = BoxTargets(BOXES, torch.zeros(2, dtype=torch.int64))
    rules = {"positive_iou": 0.5, "sampling": Sampling(4, 0.5), "only_positives": only_positives}

    def sample_all() -> None:
        samples = sample_rois([PROPOSALS] * 5, [target] * 5, **rules)
        samples.positive_rows(torch.cat(samples.boxes))
        samples.positives()

    reads = host_reads(sample_all, "cpu")
    assert reads.total() == 1, shown(reads)


def test_the_best_proposal_of_a_box_is_its_own_though_another_box_fits_better() -> None:
    # IoU of the proposal with the boxes: 30/40 = 0.75 and 25/40 = 0.625; the second has no better one and claims it.
    boxes = torch.tensor([[0.0, 0, 40, 30], [0, 15, 40, 40]])
    proposal = torch.tensor([[0.0, 0, 40, 40]])
    target = BoxTargets(boxes, torch.zeros(2, dtype=torch.int64))
    rules = {"positive_iou": 0.5, "sampling": Sampling(9, 1.0), "only_positives": False}
    samples = sample_rois([proposal], [target], **rules)
    assert samples.matched[0].tolist() == [0, 1, 1]
    assert samples.is_box[0].tolist() == [True, True, False]
    # A cascade's heads let it have the box that it fits better.
    assert sample_rois([proposal], [target], **rules, claims=False).matched[0].tolist() == [0, 1, 0]


def test_initial_weights_are_mmdetections() -> None:
    torch.manual_seed(0)
    head = BoxHead(RCNNConfig(neck_channels=64, head_convs=2, head_features=256))
    conv = head.convs[0][0]
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)  # Kaiming normal, fan out
    assert head.fc.weight.abs().max().item() <= (6 / (64 * 49 + 256)) ** 0.5  # Xavier uniform
    assert not conv.bias.any() and not head.fc.bias.any()
