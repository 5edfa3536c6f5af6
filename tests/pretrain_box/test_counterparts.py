"""With what a user gets without asking, nearly every sampled box meets its instance in the other view."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import BoxTargets
from aligndet_cli.detectors import DETECTORS, Detector
from aligndet_cli.detectors.interface import Features
from helpers.small_detectors import NARROW

SIZES_HW = ((800, 1088), (640, 864))  # of the two views: the largest and smallest default, of a 3:4 photograph
CHANNELS = {"c2": 64, "c3": 128, "c4": 256, "c5": 512}  # of a ResNet-18
NUM_IMAGES = 2


def propose(generator: torch.Generator) -> Tensor:
    """Some 200 boxes like proposals on the larger view: sides of 32 px and more, no two of an IoU above 0.5."""
    height, width = SIZES_HW[0]
    side = 32 * (0.8 * height / 32) ** torch.rand(400, 1, generator=generator) ** 1.5
    ratio = 3 ** (torch.rand(400, 1, generator=generator) - 0.5)
    half = torch.cat([side * ratio, side / ratio], dim=1) / 2
    centre = torch.rand(400, 2, generator=generator) * torch.tensor([width, height])
    boxes = clip_boxes_to_image(torch.cat([centre - half, centre + half], dim=1), (height, width))
    return boxes[nms(boxes, torch.arange(400, 0, -1.0), 0.5)]


def to_second_view(boxes: Tensor) -> Tensor:
    """Flipped and smaller."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    (height, width), (smaller_height, smaller_width) = SIZES_HW
    scale = torch.tensor([smaller_width / width, smaller_height / height]).repeat(2)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1) * scale


@torch.no_grad()
def sampled_ids(detector: Detector, boxes: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
    """Instances of the boxes that a view offers the contrast; the features are noise."""
    height, width = size_hw
    maps = {
        level: torch.randn(len(boxes), channels, -(-height // stride), -(-width // stride))
        for (level, channels), stride in zip(CHANNELS.items(), (4, 8, 16, 32), strict=True)
    }
    ids = torch.arange(sum(map(len, boxes))).split([len(of_image) for of_image in boxes])
    targets = [BoxTargets(b, torch.zeros_like(i), i) for b, i in zip(boxes, ids, strict=True)]
    features = Features(maps, (size_hw,) * len(boxes), size_hw)
    return detector.box_candidates(features, targets, with_losses=False).instance_ids


@pytest.mark.parametrize("family", sorted(DETECTORS))
def test_nearly_all_boxes_have_a_counterpart(family: str) -> None:
    torch.manual_seed(0)
    config = NARROW[family]
    detector = config.build(build_backbone(BackboneConfig(name="resnet18")), 1).eval()
    generator = torch.Generator().manual_seed(0)
    first = [propose(generator)[: config.RECIPE.topk] for _ in range(NUM_IMAGES)]
    assert [len(boxes) for boxes in first] == [config.RECIPE.topk] * NUM_IMAGES
    online = sampled_ids(detector, first, SIZES_HW[0])
    momentum = sampled_ids(detector, [to_second_view(boxes) for boxes in first], SIZES_HW[1])
    queries = online[online >= 0]
    assert len(queries) >= config.RECIPE.topk and torch.isin(queries, momentum).float().mean() >= 0.95
