"""Detectors of torchvision find the same after import; those of detectron2, not installed here, by its rules."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.faster_rcnn import _default_anchorgen as rcnn_anchors
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.retinanet import _default_anchorgen as retinanet_anchors
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.data.transforms import MEAN, STD
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.checkpoint import DetectorFile
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.tools.conversion.categories import COCO_BY_ID, resolve_categories
from aligndet_cli.tools.conversion.convert import Converted, convert
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from aligndet_cli.tools.conversion.published_detectron2 import RULES
from aligndet_cli.tools.conversion.reading import Checkpoint
from aligndet_cli.tools.conversion.rules import translate
from aligndet_cli.tools.conversion.torchvision_names import to_torchvision
from helpers.small_detectors import detector_file

FILE = Path("some.pth")
WIDTH, HIDDEN, CLASSES = 16, 24, 5
SIZES_HW = ((150, 203), (121, 224))  # padded to 160 x 224: no multiple of the strides 64 and 128
COCO_MEAN_BGR = (103.53, 116.28, 123.675)


# ---- torchvision ----


def torchvision_body(levels: int, norm: type[nn.Module], **options: object) -> BackboneWithFPN:
    names = {f"layer{4 - levels + 1 + i}": str(i) for i in range(levels)}
    return BackboneWithFPN(resnet18(norm_layer=norm), names, [64, 128, 256, 512][4 - levels :], **options)


def torchvision_model(kind: str) -> nn.Module:
    """Small ones, made of the parts that torchvision's builders use."""
    torch.manual_seed(11)
    if kind.startswith("retinanet"):
        is_first = kind == "retinanet"
        width = WIDTH if is_first else 64  # of group norm
        extra = LastLevelP6P7(width if is_first else 512, width)
        body = torchvision_body(3, FrozenBatchNorm2d, out_channels=width, extra_blocks=extra)
        head = RetinaNetHead(width, 9, CLASSES, norm_layer=None if is_first else partial(nn.GroupNorm, 32))
        return RetinaNet(body, CLASSES, anchor_generator=retinanet_anchors(), head=head)
    norm = FrozenBatchNorm2d if kind == "faster-rcnn" else nn.BatchNorm2d
    neck = {} if kind == "faster-rcnn" else {"norm_layer": norm}
    body = torchvision_body(4, norm, out_channels=WIDTH, extra_blocks=LastLevelMaxPool(), **neck)
    options = {"rpn_anchor_generator": rcnn_anchors(), "box_predictor": FastRCNNPredictor(HIDDEN, CLASSES)}
    if kind == "faster-rcnn":
        return FasterRCNN(body, box_head=TwoMLPHead(WIDTH * 49, HIDDEN), **options)
    return MaskRCNN(
        body,
        rpn_head=RPNHead(WIDTH, 3, conv_depth=2),
        box_head=FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 2, [HIDDEN], norm_layer=norm),
        mask_head=MaskRCNNHeads(WIDTH, [WIDTH] * 2, 1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(WIDTH, WIDTH, CLASSES),
        **options,
    )


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Weights with which scores and boxes differ from place to place; norms with variances near 1e-5."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(10 ** torch.empty_like(value).uniform_(-4, 0))
        elif name.endswith("running_mean"):
            value.normal_(std=0.1)
    for name, value in model.state_dict().items():
        owner = name.removesuffix(".weight")
        if f"{owner}.running_var" in model.state_dict() and name != owner:
            value.copy_(model.state_dict()[f"{owner}.running_var"].sqrt())  # as the variance seen in training
    for name, weight in model.named_parameters():
        if name.endswith("cls_score.weight"):
            weight.normal_(std=0.3)
        elif name.startswith("head.") and weight.dim() == 4:
            weight.normal_(std=(2 / weight[0].numel()) ** 0.5 * (1.0 if ".conv." in name else 0.15))
        elif name.endswith("bias") and ("cls_logits" in name or "cls_score" in name):
            weight.normal_()


def run_there(model: nn.Module, images: list[Tensor]) -> tuple[ImageBatch, list[dict[str, Tensor]]]:
    """The tensor that torchvision's network sees, and what it finds, without resizing."""
    model.transform.resize = lambda image, target: (image, target)
    model.transform.postprocess = lambda result, *sizes: result
    batch, _ = model.transform(images)
    with torch.no_grad():
        return ImageBatch(batch.tensors, tuple(batch.image_sizes)), model(images)


def loaded(converted: Converted) -> Detector:
    model = converted.detector.build(build_backbone(converted.backbone), converted.num_classes)
    model.load_state_dict(converted.state_dict)
    return model.eval()


def without_ties(boxes: Tensor, scores: Tensor, wanted: Tensor) -> Tensor:
    """The order of `boxes` in which scores that differ by rounding alone stand as their boxes do in `wanted`."""
    is_tied = (scores[:, None] - scores).abs() < 2e-6
    order = torch.where(is_tied, torch.cdist(wanted, boxes), torch.inf).argmin(dim=1)
    assert len(order.unique()) == len(order)
    return order


@pytest.mark.parametrize("kind", ["retinanet", "retinanet_v2", "faster-rcnn", "mask-rcnn_v2"])
def test_torchvision_detections_are_the_same(kind: str) -> None:
    model = torchvision_model(kind).eval()
    spread(model)
    digest = ""
    if kind == "faster-rcnn":  # as the released file, whose norms add nothing to the variance
        overwrite_eps(model, 0.0)
        digest = "258fb6c6" + "0" * 56
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(size[0])) for size in SIZES_HW]
    batch, expected = run_there(model, images)
    converted = convert(Checkpoint(FILE, dict(model.state_dict()), {}, digest))
    family = kind.removesuffix("_v2")
    assert (converted.layout, converted.detector.family, converted.left_out) == ("torchvision", family, {})
    is_dense = family == "retinanet"
    for ours, theirs in zip(loaded(converted).detect(batch), expected, strict=True):
        assert len(ours.scores) == len(theirs["scores"]) >= 30
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=1e-4)
        order = without_ties(ours.boxes, ours.scores, theirs["boxes"])
        torch.testing.assert_close(ours.boxes[order], theirs["boxes"], rtol=0, atol=1e-2)
        assert torch.equal(ours.class_ids[order], theirs["labels"] - (0 if is_dense else 1))
        if family == "mask-rcnn":
            torch.testing.assert_close(ours.masks[order], theirs["masks"][:, 0], rtol=0, atol=1e-4)

    if not digest:  # and back: under its names, which torchvision takes
        backbone = BackboneConfig(name="resnet18")
        content = DetectorFile("finetune", converted.detector, backbone, (), (800, 1333), converted.state_dict)
        tensors, left_out, _ = to_torchvision(content)
        assert not left_out
        model.load_state_dict(tensors)
        again = convert(Checkpoint(FILE, tensors, {}))
        assert all(torch.equal(again.state_dict[name], t) for name, t in converted.state_dict.items())


def test_names_of_older_torchvision() -> None:
    """The released first versions have them: convolutions without the number of their block's part."""
    tensors = dict(torchvision_model("retinanet").state_dict())
    old = {}
    for name, value in tensors.items():
        words = name.split(".")
        if words[2] == "conv":
            words[3:5] = [str(2 * int(words[3]))]  # ReLUs were counted
        elif words[1] == "fpn" and words[2] != "extra_blocks":
            del words[4]
        old[".".join(words)] = value
    assert "head.regression_head.conv.6.bias" in old and "backbone.fpn.layer_blocks.2.weight" in old
    expected, again = (convert(Checkpoint(FILE, of, {})) for of in (tensors, old))
    assert again.detector == expected.detector and list(again.state_dict) == list(expected.state_dict)
    assert all(torch.equal(again.state_dict[name], t) for name, t in expected.state_dict.items())

    tensors = dict(torchvision_model("faster-rcnn").state_dict())
    masks = MaskRCNNHeads(WIDTH, [WIDTH] * 4, 1).state_dict()
    old = {f"roi_heads.mask_head.mask_fcn{int(n[0]) + 1}.{n.split('.')[-1]}": t for n, t in masks.items()}
    predictor = MaskRCNNPredictor(WIDTH, WIDTH, CLASSES).state_dict()
    old |= {f"roi_heads.mask_predictor.{name}": value for name, value in predictor.items()}
    old |= {name.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for name, value in tensors.items()}
    again = convert(Checkpoint(FILE, old, {}))
    assert again.detector.family == "mask-rcnn" and again.detector.mask_convs == 4
    assert torch.equal(again.state_dict["mask_head.convs.3.0.weight"], masks["3.0.weight"])
    assert torch.equal(again.state_dict["rpn.conv.weight"], tensors["rpn.head.conv.0.0.weight"])


def test_torchvision_classes_are_coco_ids() -> None:
    assert [c.category_id for c in resolve_categories(None, 90, {}, FILE)] == list(range(1, 91))
    assert resolve_categories(None, 91, {}, FILE) == COCO_BY_ID


# ---- detectron2 ----


def detectron2_anchors(sizes: list[float]) -> Tensor:
    """Of one cell, size by size."""
    rows = []
    for size in sizes:
        for ratio in (0.5, 1.0, 2.0):
            width = math.sqrt(size**2 / ratio)
            rows.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
    return torch.tensor(rows)


def detectron2_tensors(family: str, model: Detector) -> dict[str, Tensor]:
    """The model's tensors under detectron2's names; norms have no counters there."""
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    renamed = {translate(name, RULES[family], to_ours=False): value for name, value in state.items()}
    assert len(renamed) == len(state) and None not in renamed
    return renamed


def detectron2_block(tensors: dict[str, Tensor], prefix: str, x: Tensor, stride: int) -> Tensor:
    """A bottleneck with `STRIDE_IN_1X1`."""

    def conv(name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        weight, bias, mean, variance = (
            tensors[f"{prefix}.{name}.norm.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = conv2d(x, tensors[f"{prefix}.{name}.weight"], stride=stride, padding=padding)
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    shortcut = conv("shortcut", x, stride) if f"{prefix}.shortcut.weight" in tensors else x
    hidden = conv("conv2", conv("conv1", x, stride).relu(), padding=1).relu()
    return (conv("conv3", hidden) + shortcut).relu()


@torch.no_grad()
def test_detectron2_caffe_style_backbone() -> None:
    torch.manual_seed(13)
    config = FasterRCNNConfig(neck_channels=8, neck_norm="none", head_convs=0, head_fcs=2, head_features=12)
    model = config.build(build_backbone(BackboneConfig(name="resnet50")), 3)
    tensors = detectron2_tensors("faster-rcnn", model)
    tensors["backbone.bottom_up.stem.conv1.weight"] = torch.randn(64, 3, 7, 7) / 500
    tensors["backbone.bottom_up.stem.conv1.norm.running_mean"] = torch.randn(64)
    with pytest.raises(WeightsError, match=r"add --style caffe .* or pytorch"):
        convert(Checkpoint(FILE, tensors, {}))
    converted = convert(Checkpoint(FILE, tensors, {}), style="caffe")
    assert converted.backbone.stride_in_1x1 and converted.detector == config and converted.num_classes == 3
    assert not convert(Checkpoint(FILE, tensors, {}), style="pytorch").backbone.stride_in_1x1

    pixels = torch.randint(0, 256, (1, 3, 61, 83)).float()  # RGB
    x = pixels.flip(1) - torch.tensor(COCO_MEAN_BGR)[:, None, None]
    x = conv2d(x, tensors["backbone.bottom_up.stem.conv1.weight"], stride=2, padding=3)
    norm = {p: tensors[f"backbone.bottom_up.stem.conv1.norm.{p}"][:, None, None] for p in ("weight", "bias")}
    mean, variance = (
        tensors[f"backbone.bottom_up.stem.conv1.norm.running_{p}"][:, None, None] for p in ("mean", "var")
    )
    x = ((x - mean) / (variance + 1e-5).sqrt() * norm["weight"] + norm["bias"]).relu()
    x = max_pool2d(x, 3, 2, 1)
    for stage, num_blocks in ((2, 3), (3, 4)):
        for block in range(num_blocks):
            x = detectron2_block(tensors, f"backbone.bottom_up.res{stage}.{block}", x, 1 + (stage == 3 and block == 0))
    ours = loaded(converted)
    seen = (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(ours.backbone(seen)["c3"], x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_detectron2_retinanet() -> None:
    """Nine anchors are counted the other way round there, and the file tells how images are prepared."""
    torch.manual_seed(17)
    options = {"extra_levels": "from_c5_relu", "clip_before_nms": False}
    config = RetinaNetConfig(neck_channels=8, head_convs=2, neck_norm="none", **options)
    model = config.build(build_backbone(BackboneConfig(name="resnet18")), 2)
    tensors = detectron2_tensors("retinanet", model)
    # scale s, ratio r, class k: the digits of the bias
    theirs = [100 * s + 10 * r + k for s in range(3) for r in range(3) for k in range(2)]
    tensors["head.cls_score.bias"] = torch.tensor(theirs, dtype=torch.float32)
    for level, size in enumerate((32, 64, 128, 256, 512)):
        scaled = [size * 2 ** (octave / 3) for octave in range(3)]
        tensors[f"anchor_generator.cell_anchors.{level}"] = detectron2_anchors(scaled)
    tensors["pixel_mean"] = torch.tensor(COCO_MEAN_BGR)[:, None, None]
    tensors["pixel_std"] = torch.ones(3, 1, 1)
    converted = convert(Checkpoint(FILE, tensors, {}))
    assert converted.detector == config and len(converted.left_out) == 7
    assert converted.state_dict["class_predictor.bias"].tolist() == [
        100 * s + 10 * r + k for r in range(3) for s in range(3) for k in range(2)
    ]
    assert not converted.backbone.stride_in_1x1  # a ResNet-18 has no 1x1 convolutions there
    loaded(converted)

    tensors["anchor_generator.cell_anchors.0"] = detectron2_anchors([24, 32, 40])
    with pytest.raises(WeightsError, match="has other anchors than ours"):
        convert(Checkpoint(FILE, tensors, {}))


def test_channels_of_mmdetections_caffe_style() -> None:
    checkpoint, _ = mmdet_checkpoint(detector_file("retinanet"))
    tensors = checkpoint["state_dict"]
    mean = ", ".join(map(str, COCO_MEAN_BGR))
    config = "model = dict(type='RetinaNet', backbone=dict(style='caffe'))\n"
    config += f"img_norm_cfg = dict(\n mean=[{mean}], std=[1.0, 1.0, 1.0], to_rgb=False)"
    ours = convert(Checkpoint(FILE, tensors, {"config": config})).state_dict["backbone.conv1.weight"]
    theirs = tensors["backbone.conv1.weight"]
    pixels = torch.randint(0, 256, (1, 3, 9, 9)).float()
    seen = (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = conv2d(pixels.flip(1) - torch.tensor(COCO_MEAN_BGR)[:, None, None], theirs, padding=3)
    torch.testing.assert_close(conv2d(seen, ours, padding=3), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(
        convert(Checkpoint(FILE, tensors, {}), style="pytorch").state_dict["backbone.conv1.weight"], theirs
    )


# ---- refusals ----


def test_what_ours_cannot_be_equal_to() -> None:
    body = {"backbone.body.conv1.weight": torch.zeros(1)}
    dense = dict(torchvision_model("retinanet").state_dict())
    refused = (
        ({**body, "head.regression_head.bbox_ctrness.weight": torch.zeros(1)}, "torchvision's FCOS has its points"),
        (body, "none of torchvision's detectors"),
        ({"backbone.bottom_up.a": torch.zeros(1)}, "none of detectron2's detectors"),
        ({**dense, "roi_heads.keypoint_head.0.weight": torch.zeros(1)}, "1 tensors .* belong to no retinanet"),
        ({n: t for n, t in dense.items() if "cls_logits" not in n}, "class_predictor.* missing"),
        ({n: t for n, t in dense.items() if "bbox_reg.bias" not in n}, "has no box_predictor.bias"),
    )
    for tensors, said in refused:
        with pytest.raises(WeightsError, match=f"some.pth: .*{said}"):
            convert(Checkpoint(FILE, tensors, {}))
    with pytest.raises(ConfigError, match="--style: some.pth is of torchvision, which has one only"):
        convert(Checkpoint(FILE, dense, {}), style="caffe")
    with pytest.raises(ConfigError, match="--style msra: write caffe or pytorch"):
        convert(Checkpoint(FILE, dense, {}), style="msra")
