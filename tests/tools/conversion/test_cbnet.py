"""Files of CBNet v2, and AlignDet's pre-training of one: names as published, values as they are, and back again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.backbones.layouts import recognise
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.detectors.checkpoint import DetectorFile
from aligndet_cli.detectors.htc import HTCConfig
from aligndet_cli.detectors.parts.rcnn_config import DELTA_STDS
from aligndet_cli.errors import WeightsError
from aligndet_cli.tools.conversion.convert import Converted, convert
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from aligndet_cli.tools.conversion.reading import Checkpoint
from helpers.small_detectors import CATEGORIES, CONFIGS, RCNN

FILE = Path("cbnet.pth")
# Swin-T of Liu et al., table 7: width after the patches, blocks and heads of each stage.
WIDTHS, DEPTHS, HEADS = (96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24)


def swin_of_cbnet() -> dict[str, Tensor]:
    """All tensors that `CBSwinTransformer` of CBNetV2 saves for two Swin-T, written down from its code."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    for module in ("cb_modules.0", "cb_modules.1"):
        if module == "cb_modules.0":
            layer(f"{module}.patch_embed.proj", 96, 3, 4, 4)
            layer(f"{module}.patch_embed.norm", 96)
        for stage, (width, depth, heads) in enumerate(zip(WIDTHS, DEPTHS, HEADS, strict=True)):
            for block in (f"{module}.layers.{stage}.blocks.{number}" for number in range(depth)):
                layer(f"{block}.norm1", width)
                shapes[f"{block}.attn.relative_position_bias_table"] = (13 * 13, heads)
                shapes[f"{block}.attn.relative_position_index"] = (49, 49)
                layer(f"{block}.attn.qkv", 3 * width, width)
                layer(f"{block}.attn.proj", width, width)
                layer(f"{block}.norm2", width)
                layer(f"{block}.mlp.fc1", 4 * width, width)
                layer(f"{block}.mlp.fc2", width, 4 * width)
            if stage < 3:
                layer(f"{module}.layers.{stage}.downsample.norm", 4 * width)
                layer(f"{module}.layers.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
            layer(f"{module}.norm{stage}", width)
    for stage, width in enumerate(WIDTHS):
        for more, other in enumerate(WIDTHS[stage + 1 :], start=1):
            layer(f"cb_linears.{stage}.{more}", width, other, 1, 1)
    return {f"backbone.{name}": torch.rand(shape) for name, shape in shapes.items()}


def heads_of_mmdet(detector: DetectorConfig) -> dict[str, Tensor]:
    """Neck and heads of a detector under mmdetection's names, for maps as wide as a Swin-T's."""
    with torch.device("meta"):
        state = detector.build(build_backbone(BackboneConfig(name="swin_t")), 3).state_dict()
    content = content_of(detector, "resnet18", {name: torch.rand(value.shape) for name, value in state.items()})
    tensors = mmdet_checkpoint(content)[0]["state_dict"]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("backbone.")}


def semantic_of_mmdet(channels: int, num_classes: int) -> dict[str, Tensor]:
    """All tensors that mmdetection's `FusedSemanticHead` saves, written down from its code."""
    layers = {f"lateral_convs.{level}.conv": (channels, channels, 1, 1) for level in range(5)}
    layers |= {f"convs.{number}.conv": (channels, channels, 3, 3) for number in range(4)}
    layers |= {"conv_embedding.conv": (channels, channels, 1, 1), "conv_logits": (num_classes, channels, 1, 1)}
    tensors = {f"{name}.weight": torch.rand(shape) for name, shape in layers.items()}
    tensors |= {f"{name}.bias": torch.rand(shape[0]) for name, shape in layers.items()}
    return {f"roi_head.semantic_head.{name}": tensor for name, tensor in tensors.items()}


def content_of(detector: DetectorConfig, backbone: str, state: dict[str, Tensor]) -> DetectorFile:
    config = BackboneConfig.model_validate({"name": backbone, "weights": "none"})
    return DetectorFile("finetune", detector, config, CATEGORIES, (64, 96), state)


def export_again(again: Converted) -> dict[str, Tensor]:
    checkpoint, left_out = mmdet_checkpoint(content_of(again.detector, again.backbone.name, again.state_dict))
    assert not left_out
    return checkpoint["state_dict"]


def test_two_swins_with_htc() -> None:
    backbone = swin_of_cbnet()
    tensors = {**backbone, **heads_of_mmdet(CONFIGS["htc"])}
    again = convert(Checkpoint(FILE, tensors, {}), style="pytorch")
    assert (again.backbone.name, again.detector, again.stage) == ("cb-swin_t", CONFIGS["htc"], "finetune")
    indices = [name for name in tensors if name.endswith("relative_position_index")]
    assert list(again.left_out) == indices and len(indices) == 2 * sum(DEPTHS)
    with torch.device("meta"):
        wanted = CONFIGS["htc"].build(build_backbone(BackboneConfig(name="cb-swin_t")), 3).state_dict()
    assert {n: t.shape for n, t in again.state_dict.items()} == {n: t.shape for n, t in wanted.items()}
    # Each of the two is what the reader of plain Swins makes of it.
    prefix = "backbone.cb_modules.0."
    found = recognise({n.removeprefix(prefix): t for n, t in backbone.items() if n.startswith(prefix)})
    assert found is not None and found.layout == "official Swin"
    for name, value in found.tensors.items():
        if not name.endswith("relative_position_index"):
            assert again.state_dict[f"backbone.assistant.{name}"] is value, name
    assert torch.equal(
        again.state_dict["backbone.lead.features.5.3.mlp.3.weight"],
        tensors["backbone.cb_modules.1.layers.2.blocks.3.mlp.fc2.weight"],
    )
    assert torch.equal(again.state_dict["backbone.links.0.2.bias"], tensors["backbone.cb_linears.0.2.bias"])
    back = export_again(again)
    assert back.keys() == tensors.keys() - set(indices)
    assert all(back[name] is tensors[name] for name in back)


@pytest.mark.parametrize("family", ["faster-rcnn", "retinanet"])
def test_two_resnets(family: str) -> None:
    torch.manual_seed(0)
    model = CONFIGS[family].build(build_backbone(BackboneConfig(name="cb-resnet18")), 3)
    state = {n: torch.rand_like(t) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    content = content_of(CONFIGS[family], "cb-resnet18", state)
    tensors = mmdet_checkpoint(content)[0]["state_dict"]
    of_backbone = {name.removeprefix("backbone.") for name in tensors if name.startswith("backbone.")}
    # `CBResNet` with `cb_del_stages=1`: links to the stages from the second on, a convolution and a norm each
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    parts = ("0.weight", *(f"1.{part}" for part in norm))
    links = {
        f"cb_linears.{s}.{j}.{part}" for s, count in ((1, 3), (2, 2), (3, 1)) for j in range(count) for part in parts
    }
    assert {name for name in of_backbone if name.startswith("cb_linears.")} == links
    lead = {name.split(".")[2] for name in of_backbone if name.startswith("cb_modules.1.")}
    assert lead == {"layer2", "layer3", "layer4"} and "cb_modules.0.conv1.weight" in of_backbone
    # Their lead keeps the norm of the stem that it has lost.
    surplus = {f"backbone.cb_modules.1.bn1.{part}": torch.rand(64) for part in norm[:4]}
    again = convert(Checkpoint(FILE, {**tensors, **surplus}, {}), style="pytorch")
    assert again.backbone.name == "cb-resnet18" and again.detector == CONFIGS[family]
    assert again.left_out == dict.fromkeys(surplus, "norm of a stem that a lead has not")
    assert again.state_dict.keys() == state.keys()
    assert all(torch.equal(again.state_dict[name], value) for name, value in state.items())


RELEASED = """
model = dict(
    type='HybridTaskCascade',
    backbone=dict(type='CBSwinTransformer', embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]),
    neck=dict(type='CBFPN', in_channels=[96, 192, 384, 768], out_channels=256, num_outs=5),
    rpn_head=dict(
        anchor_generator=dict(scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[1.0, 1.0, 1.0, 1.0])),
    roi_head=dict(
        type='HybridTaskCascadeRoIHead',
        interleaved=True,
        mask_info_flow=True,
        num_stages=3,
        semantic_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),
            featmap_strides=[8]),
        semantic_head=dict(
            type='FusedSemanticHead', num_ins=5, fusion_level=1, num_convs=4, num_classes=183, loss_weight=0.2),
        bbox_head=[BOX_HEADS]),
    test_cfg=dict(
        rcnn=dict(
            score_thr=0.001, nms=dict(type='soft_nms', iou_threshold=0.5), max_per_img=100, mask_thr_binary=0.5)))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
""".replace(
    "BOX_HEADS",
    ", ".join(
        "dict(type='ConvFCBBoxHead', num_shared_convs=4, norm_cfg=dict(type='SyncBN', requires_grad=True), "
        "reg_class_agnostic=True, reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss', loss_weight=10.0), "
        f"bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds={list(stds)}))"
        for stds in DELTA_STDS
    ),
)


def test_htc_as_cbnet_releases_it() -> None:
    """Norms over all GPUs in the box heads alone, a loss of decoded boxes, and the semantic branch."""
    detector = HTCConfig(**RCNN, head_convs=2, head_norm="batch", mask_norm="none", mask_convs=1, neck_norm="none")
    tensors = {**swin_of_cbnet(), **heads_of_mmdet(detector), **semantic_of_mmdet(8, 183)}
    norms = {name.rpartition(".")[0] for name in tensors if name.endswith("running_var")}
    assert norms == {f"roi_head.bbox_head.{head}.shared_convs.{n}.bn" for head in range(3) for n in range(2)}
    again = convert(Checkpoint(FILE, tensors, {"config": RELEASED}))
    assert again.detector == detector.model_copy(update={"semantic_classes": 183})
    assert again.backbone.name == "cb-swin_t" and again.stage == "finetune"
    assert all(name.endswith("relative_position_index") for name in again.left_out)
    with torch.device("meta"):
        wanted = again.detector.build(build_backbone(again.backbone), 3).state_dict()
    assert {n: t.shape for n, t in again.state_dict.items()} == {n: t.shape for n, t in wanted.items()}
    branch = "roi_head.semantic_head."
    for theirs, ours in (("lateral_convs.4.conv", "lateral_convs.4.0"), ("conv_embedding.conv", "embedding.0")):
        assert again.state_dict[f"semantic_head.{ours}.bias"] is tensors[f"{branch}{theirs}.bias"]
    back = export_again(again)
    assert back.keys() == tensors.keys() - again.left_out.keys()
    assert all(back[name] is tensors[name] for name in back)


@pytest.mark.parametrize(
    ("theirs", "wrong", "message"),
    [
        ("fusion_level=1", "fusion_level=2", r"has roi_head.semantic_head.fusion_level = 2, our htc has 1; it would"),
        (
            "featmap_strides=[8]",
            "featmap_strides=[4]",
            r"semantic_roi_extractor.featmap_strides = \[4\], our htc has \[8",
        ),
        (
            "interleaved=True",
            "semantic_fusion=('mask',)",
            r"semantic_fusion = \['mask'\], our htc has \['bbox', 'mask'\]",
        ),
    ],
)
def test_a_semantic_branch_of_another_kind_is_refused(theirs: str, wrong: str, message: str) -> None:
    tensors = {**swin_of_cbnet(), **heads_of_mmdet(CONFIGS["htc"]), **semantic_of_mmdet(8, 183)}
    assert theirs in RELEASED
    with pytest.raises(WeightsError, match=message):
        convert(Checkpoint(FILE, tensors, {"config": RELEASED.replace(theirs, wrong)}))
    # One with norms, or with another number of convolutions.
    tensors["roi_head.semantic_head.convs.0.bn.weight"] = torch.rand(8)
    with pytest.raises(WeightsError, match=r"1 tensors \(semantic_head.convs.0.1.weight\) too many"):
        convert(Checkpoint(FILE, tensors, {"config": RELEASED}))
    del tensors["roi_head.semantic_head.convs.0.bn.weight"], tensors["roi_head.semantic_head.convs.3.conv.bias"]
    with pytest.raises(WeightsError, match=r"1 tensors \(semantic_head.convs.3.0.bias\) missing"):
        convert(Checkpoint(FILE, tensors, {"config": RELEASED}))


def test_pretraining_of_the_authors() -> None:
    """As their `selfsup/cbv2.py` saves it: three names of the detector, without masks and classes."""
    inner = {**swin_of_cbnet(), **heads_of_mmdet(CONFIGS["cascade-rcnn"])}
    inner = {name: tensor for name, tensor in inner.items() if ".fc_cls." not in name}
    for head in range(3):
        for layer, shape in (("0", (12, 12)), ("2", (32, 12))):
            inner[f"roi_head.bbox_head.{head}.fc_cls.{layer}.weight"] = torch.rand(shape)
            inner[f"roi_head.bbox_head.{head}.fc_cls.{layer}.bias"] = torch.rand(shape[0])
    names = "online_backbone", "target_backbone", "backbone"
    copies = {f"{copy}.{name}": tensor for copy in names for name, tensor in inner.items()}
    model = "dict(backbone=dict(backbone=dict(type='CBSwinTransformer'), neck=dict(type='CBFPN', num_outs=5), roi_head="
    config = f"model = {model}dict(type='SelfSupCBv2Head', num_stages=3)))"
    again = convert(Checkpoint(FILE, copies, {"config": config}))
    assert (again.layout, again.stage, again.backbone.name) == ("aligndet", "pretrain-box", "cb-swin_t")
    assert again.detector.family == "cascade-rcnn" and len(again.projector) == 12
    unused = {name for name in inner if name.endswith("relative_position_index")}
    copied = {f"{copy}.{name}" for copy in names[1:] for name in inner}
    assert set(again.left_out) == copied | unused
    with torch.device("meta"):
        wanted = again.detector.build(build_backbone(again.backbone), 1).state_dict()
    assert again.state_dict.keys() == {name for name in wanted if not name.startswith("class_predictor.")}


def test_another_number_of_stages_that_are_shared_is_refused() -> None:
    tensors = {**swin_of_cbnet(), **heads_of_mmdet(CONFIGS["htc"])}
    config = "model = dict(backbone=dict(type='CBSwinTransformer', cb_del_stages=2))"
    with pytest.raises(WeightsError, match=r"has backbone.cb_del_stages = 2, our htc has 1; it would detect something"):
        convert(Checkpoint(FILE, tensors, {"config": config}), style="pytorch")
    del tensors["backbone.cb_linears.1.2.weight"]
    with pytest.raises(WeightsError, match=r"1 tensors \(backbone.links.1.2.weight\) missing"):
        convert(Checkpoint(FILE, tensors, {}), style="pytorch")
