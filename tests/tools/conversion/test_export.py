"""Exported modules compute what ours do."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.fcos import FCOSClassificationHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.tools.conversion.torchvision_names import to_torchvision
from helpers.small_detectors import CONFIGS, build, detector_file

SIZE_HW = (64, 96)
PIXELS = torch.randn(1, 3, *SIZE_HW, generator=torch.Generator().manual_seed(3))


def fill(module: nn.Module, tensors: dict[str, Tensor], prefix: str, *, lacks: str = "nothing") -> nn.Module:
    """The module with all tensors that have the prefix, each of which must have its place."""
    part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    missing, unexpected = module.load_state_dict(part, strict=False)
    assert part and not unexpected and all(name.startswith(lacks) for name in missing), (missing, unexpected)
    return module.eval()


def pyramid_of(tensors: dict[str, Tensor], widths: list[int], channels: int, **options: object) -> list[Tensor]:
    layers = {f"layer{4 - len(widths) + 1 + i}": str(i) for i in range(len(widths))}
    lacks = "fpn.extra_blocks." if options.pop("lacks_extra", False) else "body.fc."
    body = BackboneWithFPN(resnet18(), layers, widths, channels, **options)
    return list(fill(body, tensors, "backbone.", lacks=lacks)(PIXELS).values())


@torch.no_grad()
def test_torchvision_retinanet() -> None:
    tensors, left_out, usage = to_torchvision(detector_file("retinanet"))
    assert {name.rsplit(".", 2)[0] for name in left_out} == {f"neck.pyramid.extra_blocks.{p}" for p in ("p6", "p7")}
    assert "norm_layer=nn.BatchNorm2d" in usage and "RetinaNet" in usage
    model = build("retinanet")
    ours = model.neck(model.extract(ImageBatch(PIXELS, (SIZE_HW,))).maps)
    extra = LastLevelP6P7(512, 8)
    theirs = pyramid_of(tensors, [128, 256, 512], 8, norm_layer=nn.BatchNorm2d, extra_blocks=extra, lacks_extra=True)
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs, strict=False))
    head = RetinaNetHead(8, 9, 3)
    head.classification_head.conv, head.regression_head.conv = (
        head.classification_head.conv[:2],
        head.regression_head.conv[:2],
    )
    fill(head, tensors, "head.")
    assert torch.equal(
        head.classification_head.cls_logits(head.classification_head.conv(ours[0])), model.predict_logits(ours)[0]
    )
    assert torch.equal(head.regression_head.bbox_reg(head.regression_head.conv(ours[0])), model.predict_deltas(ours)[0])


@torch.no_grad()
def test_torchvision_fcos() -> None:
    tensors, left_out, _ = to_torchvision(detector_file("fcos"))
    assert {name.rsplit(".", 1)[0].split(".0")[0] for name in left_out} >= {"box_predictor.sides", "head.scales"}
    model = build("fcos")
    ours = model.neck(model.extract(ImageBatch(PIXELS, (SIZE_HW,))).maps)
    theirs = pyramid_of(tensors, [128, 256, 512], 64, extra_blocks=LastLevelP6P7(64, 64))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    head = FCOSClassificationHead(64, 1, 3, num_convs=1, norm_layer=partial(nn.GroupNorm, 32))
    fill(head, tensors, "head.classification_head.")
    expected = model.class_predictor(model.head.class_tower(ours[1]))
    torch.testing.assert_close(head.cls_logits(head.conv(ours[1])), expected)


@pytest.mark.parametrize("family", ["faster-rcnn", "mask-rcnn"])
@torch.no_grad()
def test_torchvision_rcnn(family: str) -> None:
    tensors, left_out, _ = to_torchvision(detector_file(family))
    assert left_out == []
    model, config = build(family), CONFIGS[family]
    norm = {"norm_layer": nn.BatchNorm2d} if family == "mask-rcnn" else {}
    ours = model.neck(model.extract(ImageBatch(PIXELS, (SIZE_HW,))).maps)
    theirs = pyramid_of(tensors, [64, 128, 256, 512], 8, extra_blocks=LastLevelMaxPool(), **norm)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    logits, deltas = fill(RPNHead(8, 3), tensors, "rpn.head.")(ours)
    assert torch.equal(logits[1], model.rpn(ours)[0][1]) and torch.equal(deltas[1], model.rpn(ours)[1][1])
    pooled = torch.randn(5, 8, 7, 7)
    head = FastRCNNConvFCHead((8, 7, 7), [8] * config.head_convs, [12] * config.head_fcs, **norm)
    hidden = fill(head, tensors, "roi_heads.box_head.")(pooled)
    torch.testing.assert_close(hidden, model.head(pooled))
    scores, boxes = fill(FastRCNNPredictor(12, 4), tensors, "roi_heads.box_predictor.")(hidden)
    torch.testing.assert_close(scores.roll(-1, dims=1), model.class_predictor(hidden))  # background comes first there
    torch.testing.assert_close(boxes[:, 4:], model.box_predictor(hidden))
    if family == "mask-rcnn":
        masks = fill(MaskRCNNHeads(8, [8, 8], 1, **norm), tensors, "roi_heads.mask_head.")(pooled)
        logits = fill(MaskRCNNPredictor(8, 8, 4), tensors, "roi_heads.mask_predictor.")(masks)
        torch.testing.assert_close(logits[:, 1:], model.mask_predictor(model.mask_head(pooled)))


def test_torchvision_has_no_detr() -> None:
    tensors, left_out, usage = to_torchvision(detector_file("detr"))
    assert "no DETR" in usage and all(name.startswith("backbone.body.") for name in tensors)
    assert len(tensors) + len(left_out) == len(detector_file("detr").state_dict)
