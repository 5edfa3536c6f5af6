import torch

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.detectors.parts.two_stage import agreement_of
from helpers.small_detectors import SMALL


def test_agreement_is_the_summed_overlap_with_equal_boxes() -> None:
    # A and B: 90 of 100 pixels, IoU 0.9; C is 0.5 of A, so that it does not count; D has no area.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 5], [3, 3, 3, 3]])
    torch.testing.assert_close(agreement_of(boxes), torch.tensor([1.9, 1.9, 1.0, 0.0]) / 4)
    assert agreement_of(boxes[:0]).shape == (0,)


def test_objects_are_proposals_that_the_head_has_refined() -> None:
    torch.manual_seed(0)
    config = SMALL["faster-rcnn"].model_copy(update={"max_detections": 1000})
    model = config.build(build_backbone(BackboneConfig(name="resnet18")), 1).eval()
    images = ImageBatch(torch.randn(2, 3, 64, 96), ((64, 96), (50, 80)))
    torch.nn.init.zeros_(model.box_predictor.weight)  # the head moves nothing but by its bias
    with torch.no_grad():
        proposed = model.rpn.propose_scored(
            model.rpn(model.neck(model.extract(images).maps)), images.sizes_hw, config.test_proposals_per_level, 1000
        )
    for (boxes, scores), found in zip(proposed, model.find_objects(images), strict=True):
        order = (scores * agreement_of(boxes)).argsort(descending=True)
        torch.testing.assert_close(found.boxes[0], boxes[order[0]])
        torch.testing.assert_close(found.scores[0], (scores * agreement_of(boxes))[order[0]])
        assert 1 < len(found.boxes) < len(boxes) and (found.class_ids == 0).all()
    # dw = 1 times the deviation of 0.2 makes boxes wider by e^0.2.
    with torch.no_grad():
        model.box_predictor.bias.copy_(torch.tensor([0.0, 0, 1, 0]))
    before = proposed[0][0]
    inside = (before[:, 0] > 20) & (before[:, 2] < 76)
    wider = {round(float(side), 2) for side in (before[:, 2] - before[:, 0])[inside] * 2.718281828**0.2}
    found = model.find_objects(images)[0].boxes
    assert {round(float(side), 2) for side in found[:, 2] - found[:, 0]} & wider
