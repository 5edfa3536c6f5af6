"""Cascade R-CNN, Cascade Mask R-CNN and HTC against a second implementation that has no tricks.

There are no reference numbers of another program for them; see `helpers/plain_cascade.py`.
"""

import itertools

import pytest
import torch
from torch import Tensor

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import NO_CLASS, BoxTargets, ImageBatch
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.parts.two_stage import refine_boxes, train_boxes
from helpers.plain_cascade import PlainCascade
from helpers.small_detectors import NARROW
from helpers.trained_like import let_find_much

FAMILIES = ("cascade-rcnn", "cascade-mask-rcnn", "htc")
SIZES_HW = ((61, 83), (96, 64))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# By name: numbers of boxes in the two images, and settings.
CASES: dict[str, tuple[tuple[int, int], dict[str, object]]] = {
    "all are sampled": ((5, 3), {"roi_samples": 9999}),
    "an image without boxes": ((0, 4), {"roi_samples": 9999, "nms_type": "soft_nms"}),
    "few are sampled": ((4, 2), {"roi_samples": 24, "roi_positive_fraction": 0.5, "score_threshold": 0.2}),
}
# Of HTC alone: a semantic branch, whose features are pooled to 14 x 14 and averaged to what the heads take.
SEMANTIC = ((4, 3), {"roi_samples": 64, "semantic_classes": 5, "mask_pool_size": 4})
WITH_SEMANTIC = "classes of pixels"
RUNS = [*itertools.product(FAMILIES, CASES), ("htc", WITH_SEMANTIC)]
FEW = {"rpn_samples": 10**6, "train_proposals_per_level": 20, "test_proposals_per_level": 20, "pool_size": 3}


def make_images() -> ImageBatch:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.zeros(2, 3, 96, 96)
    for image, (height, width) in zip(pixels, SIZES_HW, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    return ImageBatch(pixels, SIZES_HW)


def make_targets(model: Detector, counts: tuple[int, int]) -> list[BoxTargets]:
    """Boxes near what the RPN proposes, so that there are positives of all heads; every third has no mask."""
    config, images = model.config, make_images()
    with torch.no_grad():
        pyramid = model.neck(model.extract(images).maps)
        proposed = model.rpn.propose(model.rpn(pyramid), SIZES_HW, config.train_proposals_per_level, 2000)
    generator = torch.Generator().manual_seed(4)
    targets = []
    for boxes, count, (height, width) in zip(proposed, counts, SIZES_HW, strict=True):
        large = boxes[((boxes[:, 2:] - boxes[:, :2]) > 12).all(dim=1)]
        chosen = large[torch.randperm(len(large), generator=generator)[:count]]
        assert len(chosen) == count
        shift = 2 * torch.randn(count, 4, generator=generator)
        moved = (chosen + shift).clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        y, x = torch.arange(96)[:, None] + 0.5, torch.arange(96) + 0.5
        masks = torch.stack([ellipse(box, y, x) for box in moved]) if count else torch.zeros(0, 96, 96) > 0
        masks[::3] = False
        targets.append(
            BoxTargets(moved, torch.arange(count) % 3, torch.arange(count), masks, draw_classes(height, width))
        )
    return targets


def draw_classes(height: int, width: int) -> Tensor:
    """Classes of pixels of an image that is padded to 96 x 96; the upper third has none."""
    classes = torch.full((96, 96), NO_CLASS, dtype=torch.uint8)
    classes[:height, :width] = torch.randint(0, 5, (height, width), generator=torch.Generator().manual_seed(height))
    classes[: height // 3] = NO_CLASS
    return classes


def ellipse(box: Tensor, y: Tensor, x: Tensor) -> Tensor:
    x1, y1, x2, y2 = box
    return (((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2) <= 1


def build(family: str, settings: dict[str, object]) -> Detector:
    torch.manual_seed(2)
    config = NARROW[family].model_copy(update={**FEW, **settings})
    model = config.build(build_backbone(BackboneConfig(name="resnet18")), 3).eval()
    return let_find_much(model, make_images())


@pytest.mark.parametrize(("family", "case"), RUNS)
def test_training_is_that_of_the_plain_one(family: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, settings = CASES.get(case, SEMANTIC)
    model, images = build(family, settings), make_images()
    targets = make_targets(model, counts)
    monkeypatch.setattr(torch, "randperm", lambda num, **_: torch.arange(num))  # the first ones, not random ones
    plain = PlainCascade(model)
    expected, samples = plain.train(images, targets)
    losses = model(images, targets)
    assert losses.keys() == expected.keys() and min(expected.values()) > 0.01
    assert ("loss_semantic" in losses) == (case == WITH_SEMANTIC)
    for name, loss in losses.items():
        torch.testing.assert_close(loss.item(), expected[name], **CLOSE)

    with torch.no_grad():
        [(_, trained)] = train_boxes(model, [model.pyramid(model.extract(images).maps)], SIZES_HW, targets)
    for stage, (ours, theirs) in enumerate(zip(trained, samples, strict=True)):
        refined = plain.refine(stage, theirs)
        for image, sample in enumerate(theirs):
            boxes = torch.tensor([box for box, _ in sample.rois]).reshape(-1, 4)
            matched = torch.tensor([-1 if number is None else number for _, number in sample.rois])
            torch.testing.assert_close(ours.samples.boxes[image], boxes, **CLOSE)
            assert torch.equal(ours.samples.matched[image], matched)
            assert int(ours.samples.is_box[image].sum()) == sample.num_true
            again = torch.tensor(refined[image]).reshape(-1, 4)
            torch.testing.assert_close(ours.refine(SIZES_HW)[image], again, **CLOSE)


@pytest.mark.parametrize(("family", "case"), RUNS)
def test_detections_are_those_of_the_plain_one(family: str, case: str) -> None:
    model, images = build(family, CASES.get(case, SEMANTIC)[1]), make_images()
    expected = PlainCascade(model).detect(images)
    for found, of_image in zip(model.detect(images), expected, strict=True):
        assert len(found.boxes) == len(of_image) > 10
        assert found.class_ids.tolist() == [class_id for _, class_id, _, _ in of_image]
        torch.testing.assert_close(found.scores, torch.tensor([score for score, _, _, _ in of_image]), **CLOSE)
        torch.testing.assert_close(found.boxes, torch.tensor([box for _, _, box, _ in of_image]), **CLOSE)
        masks = [mask for _, _, _, mask in of_image if mask is not None]
        assert (found.masks is None) == (not masks)
        if masks:
            torch.testing.assert_close(found.masks, torch.stack(masks), rtol=1e-5, atol=1e-4)  # of boxes so close


def test_objects_of_no_class_are_refined_three_times() -> None:
    torch.manual_seed(2)
    model = NARROW["cascade-rcnn"].build(build_backbone(BackboneConfig(name="resnet18")), 1).eval()
    for predictor in model.box_predictor:
        torch.nn.init.zeros_(predictor.weight)
        torch.nn.init.ones_(predictor.bias)
    # dx = 0.1, 0.05 and 0.033 of the width, which grows by e^0.2 and e^0.1; then by e^0.067.
    x = 20 * (0.1 + 0.05 * 2.718281828**0.2 + 0.033 * 2.718281828**0.3) + 50
    width = 20 * 2.718281828**0.367
    with torch.no_grad():
        pyramid = model.pyramid(model.extract(ImageBatch(torch.zeros(1, 3, 128, 128), ((128, 128),))).maps)
        (boxes,) = refine_boxes(model, pyramid, ((128, 128),), [torch.tensor([[40.0, 40, 60, 60]])])
    corners = torch.tensor([[x - width / 2, x - width / 2, x + width / 2, x + width / 2]])
    torch.testing.assert_close(boxes, corners)
