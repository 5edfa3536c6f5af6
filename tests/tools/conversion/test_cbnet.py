"""Files of CBNet v2, and AlignDet's pre-training of one: names as published, values as they are, and back again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.backbones.layouts import recognise
from aligndet_cli.detectors.checkpoint import DetectorFile
from aligndet_cli.errors import WeightsError
from aligndet_cli.tools.conversion.convert import Converted, convert
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from aligndet_cli.tools.conversion.reading import Checkpoint
from helpers.small_detectors import CATEGORIES, CONFIGS

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


def heads_of_mmdet(family: str) -> dict[str, Tensor]:
    """Neck and heads of a family under mmdetection's names, for maps as wide as a Swin-T's."""
    with torch.device("meta"):
        state = CONFIGS[family].build(build_backbone(BackboneConfig(name="swin_t")), 3).state_dict()
    content = content_of(family, "resnet18", {name: torch.rand(value.shape) for name, value in state.items()})
    tensors = mmdet_checkpoint(content)[0]["state_dict"]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("backbone.")}


def content_of(family: str, backbone: str, state: dict[str, Tensor]) -> DetectorFile:
    config = BackboneConfig.model_validate({"name": backbone, "weights": "none"})
    return DetectorFile("finetune", CONFIGS[family], config, CATEGORIES, (64, 96), state)


def export_again(again: Converted, family: str) -> dict[str, Tensor]:
    checkpoint, left_out = mmdet_checkpoint(content_of(family, again.backbone.name, again.state_dict))
    assert not left_out
    return checkpoint["state_dict"]


def test_two_swins_with_htc() -> None:
    backbone = swin_of_cbnet()
    tensors = {**backbone, **heads_of_mmdet("htc")}
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
    back = export_again(again, "htc")
    assert back.keys() == tensors.keys() - set(indices)
    assert all(back[name] is tensors[name] for name in back)


@pytest.mark.parametrize("family", ["faster-rcnn", "retinanet"])
def test_two_resnets(family: str) -> None:
    torch.manual_seed(0)
    model = CONFIGS[family].build(build_backbone(BackboneConfig(name="cb-resnet18")), 3)
    state = {n: torch.rand_like(t) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    content = content_of(family, "cb-resnet18", state)
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


def test_pretraining_of_the_authors() -> None:
    """As their `selfsup/cbv2.py` saves it: three names of the detector, without masks and classes."""
    inner = {**swin_of_cbnet(), **heads_of_mmdet("cascade-rcnn")}
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
    tensors = {**swin_of_cbnet(), **heads_of_mmdet("htc")}
    config = "model = dict(backbone=dict(type='CBSwinTransformer', cb_del_stages=2))"
    with pytest.raises(WeightsError, match=r"has backbone.cb_del_stages = 2, our htc has 1; it would detect something"):
        convert(Checkpoint(FILE, tensors, {"config": config}), style="pytorch")
    del tensors["backbone.cb_linears.1.2.weight"]
    with pytest.raises(WeightsError, match=r"1 tensors \(backbone.links.1.2.weight\) missing"):
        convert(Checkpoint(FILE, tensors, {}), style="pytorch")
