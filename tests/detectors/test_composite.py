"""Every detector family on two linked backbones: the losses of both, and the detections of the lead."""

import pytest
import torch
from torch import Tensor, nn

from aligndet_cli.backbones import BackboneConfig, CompositeBackbone, build_backbone
from aligndet_cli.backbones.resnet import ResNet
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.detectors import DETECTORS, Detector
from aligndet_cli.detectors.htc import HTCConfig
from aligndet_cli.detectors.recipes import RCNN
from helpers.narrow import build_narrow
from helpers.plain_cascade import PlainCascade
from helpers.small_detectors import SMALL
from helpers.trained_like import let_find_much

SIZES_HW = ((61, 83), (96, 64))


def make_images() -> ImageBatch:
    pixels = torch.zeros(2, 3, 96, 96)
    for image, (height, width) in zip(pixels, SIZES_HW, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=torch.Generator().manual_seed(3))
    return ImageBatch(pixels, SIZES_HW)


def make_targets() -> list[BoxTargets]:
    boxes = torch.tensor([[5.0, 6, 43, 52], [30.0, 10, 60, 33], [2.0, 30, 20, 55]]), torch.tensor([[8.0, 8, 50, 80]])
    masks = [torch.zeros(len(of_image), 96, 96, dtype=torch.bool) for of_image in boxes]
    for of_image, drawn in zip(boxes, masks, strict=True):
        for (x1, y1, x2, y2), mask in zip(of_image.int().tolist(), drawn, strict=True):
            mask[y1 + 2 : y2 - 3, x1 + 3 : x2 - 1] = True
    classes = (torch.arange(96)[:, None] // 16 + torch.arange(96) // 32).to(torch.uint8) % 5
    return [
        BoxTargets(b, torch.arange(len(b)) % 3, torch.arange(len(b)), m, classes)
        for b, m in zip(boxes, masks, strict=True)
    ]


def build(family: str, **settings: object) -> Detector:
    torch.manual_seed(0)
    assistant, lead = (ResNet(build_narrow("resnet18"), "resnet18") for _ in range(2))
    config = SMALL[family].model_copy(update=settings)
    model = config.build(CompositeBackbone(assistant, lead), 3)
    with torch.no_grad():  # links as after training
        for name, parameter in model.backbone.links.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if name.endswith("weight") else 0.1))
    return model


class Fixed(nn.Module):
    """A backbone that always returns the same maps."""

    def __init__(self, maps: dict[str, Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, _pixels: Tensor) -> dict[str, Tensor]:
        return self.maps


@pytest.fixture(params=sorted(DETECTORS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_losses_are_half_of_the_assistants_and_those_of_the_lead(family: str) -> None:
    model, images, targets = build(family).eval(), make_images(), make_targets()
    losses = model(images, targets)
    features = model.extract(images, with_assistant=True)
    model.backbone = Fixed(features.of_assistant)
    of_assistant = model(images, targets)
    model.backbone = Fixed(features.maps)
    of_lead = model(images, targets)
    assert losses.keys() == of_lead.keys()
    # Heads of R-CNNs look at the lead's proposals in both; see below.
    alike = {"loss_objectness", "loss_rpn_box_reg"} if family in RCNN else losses.keys()
    for name in alike:
        assert of_assistant[name] != of_lead[name]
        torch.testing.assert_close(losses[name], 0.5 * of_assistant[name] + of_lead[name])


@pytest.mark.parametrize(
    ("detector", "settings"), [("cascade-rcnn", {}), ("htc", {}), ("htc", {"semantic_classes": 5})]
)
def test_proposals_of_the_lead_are_for_both(
    detector: str, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"rpn_samples": 10**6, "train_proposals_per_level": 20, "test_proposals_per_level": 20, "pool_size": 3}
    model = let_find_much(build(detector, **few, **settings).eval(), make_images())
    monkeypatch.setattr(torch, "randperm", lambda num, **_: torch.arange(num))  # the first ones, not random ones
    expected = PlainCascade(model).train_both(make_images(), make_targets())
    losses = model(make_images(), make_targets())
    assert losses.keys() == expected.keys() and min(expected.values()) > 0.01
    for name, loss in losses.items():
        torch.testing.assert_close(loss.item(), expected[name], rtol=1e-5, atol=1e-5)


def test_detections_are_those_of_the_lead_alone(family: str) -> None:
    images = make_images()
    model = let_find_much(build(family), images)
    found = model.detect(images)
    model.backbone = Fixed(model.extract(images).maps)
    assert max(len(of_image.boxes) for of_image in found) > 0
    for one, other in zip(found, model.detect(images), strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)


def test_losses_reach_every_parameter_of_both(family: str) -> None:
    model = build(family)
    losses = model(make_images(), make_targets())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_features_of_both_are_split_alike(family: str) -> None:
    features = build(family).extract(make_images(), with_assistant=True)
    first, second = features.split(1)
    assert first.of_assistant is not None and second.of_assistant is not None
    for level, maps in (features.of_assistant or {}).items():
        assert torch.equal(torch.cat([first.of_assistant[level], second.of_assistant[level]]), maps)
        assert not torch.equal(features.maps[level], maps) or level == "c2"


def test_swin_l_with_htc_has_the_published_size() -> None:
    with torch.device("meta"):
        config = HTCConfig(neck_norm="none", semantic_classes=183)  # of COCO-stuff
        model = config.build(build_backbone(BackboneConfig(name="cb-swin_l")), 80)
    assert model.semantic_head is not None
    # CBNet's README has 453M, with the semantic branch that the paper's row lacks: five 1x1 convolutions and four 3x3
    # ones of 256 channels, one 1x1 of 256 for what is passed on, and one of 183.
    semantic = 5 * (256 * 256 + 256) + 4 * (9 * 256 * 256 + 256) + (256 * 256 + 256) + (183 * 256 + 183)
    assert sum(p.numel() for p in model.semantic_head.parameters()) == semantic
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 453
