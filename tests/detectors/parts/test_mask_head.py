import pytest
import torch
from torch import nn

from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors.parts.mask_head import MaskHead, draw_targets, mask_loss, paste_mask, predict_masks
from aligndet_cli.detectors.parts.rcnn_config import MaskSettings
from aligndet_cli.detectors.parts.roi_head import RoiSamples


def test_masks_are_those_of_their_class() -> None:
    torch.manual_seed(0)
    predictor, features = nn.Conv2d(6, 5, 1), torch.randn(3, 6, 4, 4)
    class_ids = torch.tensor([4, 0, 2])
    expected = predictor(features)[torch.arange(3), class_ids]
    torch.testing.assert_close(predict_masks(predictor, features, class_ids), expected)
    assert predict_masks(predictor, features[:0], class_ids[:0]).shape == (0, 4, 4)


def test_the_head_doubles_the_resolution() -> None:
    head = MaskHead(MaskSettings(neck_channels=8, mask_convs=2, mask_pool_size=7))
    assert head(torch.zeros(3, 8, 7, 7)).shape == (3, 8, 14, 14)


def make_targets() -> list[BoxTargets]:
    """Image 0 has a mask (left half of 16 x 32) and a box without one; image 1 has none."""
    masks = torch.zeros(2, 16, 32, dtype=torch.bool)
    masks[0, :, :16] = True
    boxes = torch.tensor([[0.0, 0, 32, 16], [4, 4, 20, 12]])
    ids = torch.zeros(2, dtype=torch.int64)
    return [BoxTargets(boxes, ids, masks=masks), BoxTargets(boxes[:1], ids[:1])]


def make_positives() -> RoiSamples:
    boxes = [torch.tensor([[0.0, 0, 32, 16], [4, 4, 20, 12], [8, 0, 24, 16]]), torch.tensor([[0.0, 0, 32, 16]])]
    matched, is_box = [torch.tensor([0, 1, 0]), torch.tensor([0])], [torch.zeros(3) > 0, torch.zeros(1) > 0]
    return RoiSamples(boxes, matched, is_box, [3, 1])


def test_targets_are_the_mask_in_the_roi() -> None:
    drawn, known = draw_targets(make_positives(), make_targets(), 4)
    assert known.tolist() == [True, False, True, False]
    half = torch.tensor([True, True, False, False]).expand(4, 4)
    assert torch.equal(drawn[0], half) and torch.equal(drawn[2], half)  # x 8..24 has its middle at 16 too
    assert not drawn[1].any() and not drawn[3].any()


def test_boxes_without_mask_do_not_count() -> None:
    drawn, known = draw_targets(make_positives(), make_targets(), 4)
    logits = torch.zeros(4, 4, 4, requires_grad=True)
    loss = mask_loss(logits, drawn, known)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())  # ln 2 everywhere, over two RoIs
    loss.backward()
    assert logits.grad[0].any() and logits.grad[2].any()
    assert not logits.grad[1].any() and not logits.grad[3].any()
    assert mask_loss(logits, drawn, torch.zeros_like(known)).item() == 0


def test_no_positives() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    nothing = RoiSamples([torch.zeros(0, 4)] * 2, [empty] * 2, [empty > 0] * 2, [0, 0])
    drawn, known = draw_targets(nothing, make_targets(), 4)
    assert drawn.shape == (0, 4, 4) and known.shape == (0,)
    assert mask_loss(torch.zeros(0, 4, 4), drawn, known).item() == 0


@pytest.mark.parametrize("box", [[3.0, 2, 11, 10], [3.3, 2.6, 12.9, 9.1], [0.0, 0, 20, 15]])
def test_a_pasted_mask_undoes_its_target(box: list[float]) -> None:
    truth = torch.zeros(15, 20, dtype=torch.bool)
    truth[4:9, 5:10] = True
    roi = torch.tensor([box])
    target = BoxTargets(roi, torch.zeros(1, dtype=torch.int64), masks=truth[None])
    drawn, _ = draw_targets(RoiSamples([roi], [torch.tensor([0])], [torch.tensor([False])], [1]), [target], 28)
    pasted, (top, left) = paste_mask(drawn[0].float(), roi[0], (15, 20))
    whole = torch.zeros(15, 20, dtype=torch.bool)
    whole[top : top + pasted.shape[0], left : left + pasted.shape[1]] = pasted
    inside = torch.zeros(15, 20, dtype=torch.bool)  # of the true mask, what is in the box
    inside[max(4, int(box[1])) : min(9, round(box[3])), max(5, int(box[0])) : min(10, round(box[2]))] = True
    union = (whole | inside).sum()
    assert (whole & inside).sum() / union > 0.9
