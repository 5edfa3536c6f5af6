"""Names, shapes and refusals of `convert`; that detections are the reference's is in `detectors/test_*_golden.py`."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.detectors.checkpoint import DetectorFile
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.tools.conversion.convert import convert
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from aligndet_cli.tools.conversion.reading import Checkpoint
from helpers.small_detectors import CONFIGS, detector_file

FILE = Path("some.pth")


def mmdet_tensors(family: str) -> dict[str, Tensor]:
    checkpoint, left_out = mmdet_checkpoint(detector_file(family))
    assert not left_out
    return checkpoint["state_dict"]


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(ours) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_shapes_tell_everything(family: str) -> None:
    original = detector_file(family)
    tensors = mmdet_tensors(family)
    assert not any(name.startswith(("head.", "neck.pyramid.")) for name in tensors)  # really renamed
    again = convert(Checkpoint(FILE, tensors, {}), style="pytorch")
    assert_same(again.state_dict, original.state_dict)
    changed = {"nms_type": "nms"} if family == "htc" else {}  # by default, ours is CBNet's
    assert again.detector == original.detector.model_copy(update=changed) and again.backbone.name == "resnet18"
    assert (again.layout, again.stage, again.num_classes, again.left_out) == ("mmdet", "finetune", 3, {})


def test_settings_that_shapes_do_not_tell_survive_our_own_export() -> None:
    original = detector_file("detr")
    changed = DetectorFile(**{**vars(original), "detector": CONFIGS["detr"].model_copy(update={"num_heads": 4})})
    checkpoint, _ = mmdet_checkpoint(changed)
    assert convert(Checkpoint(FILE, checkpoint["state_dict"], checkpoint["meta"])).detector.num_heads == 4


def test_a_detr_with_norms_first_goes_to_mmdetection_and_back() -> None:
    config = CONFIGS["detr"].model_copy(update={"pre_norm": True})
    state = dict(config.build(build_backbone(BackboneConfig(name="resnet18")), 3).state_dict())
    original = DetectorFile(**{**vars(detector_file("detr")), "detector": config, "state_dict": state})
    checkpoint, left_out = mmdet_checkpoint(original)
    assert not left_out and "bbox_head.transformer.encoder.post_norm.weight" in checkpoint["state_dict"]
    again = convert(Checkpoint(FILE, checkpoint["state_dict"], {}), style="pytorch")
    assert_same(again.state_dict, state)
    assert again.detector == config
    # a config that says the same, and one that does not
    for order, said in ((("norm", "self_attn", "norm", "ffn"), ""), (("self_attn", "norm", "ffn", "norm"), "too many")):
        layers = {"operation_order": list(order)}
        model = {"bbox_head": {"transformer": {"encoder": {"transformerlayers": layers}}}}
        meta = {"config": f"model = {model}"}
        if said:
            with pytest.raises(WeightsError, match=rf"2 tensors \(transformer.encoder.norm.* {said}"):
                convert(Checkpoint(FILE, checkpoint["state_dict"], meta), style="pytorch")
        else:
            assert convert(Checkpoint(FILE, checkpoint["state_dict"], meta), style="pytorch").detector.pre_norm


def test_a_detr_with_norms_first_in_one_part_only_is_refused() -> None:
    config = CONFIGS["detr"].model_copy(update={"pre_norm": True})
    state = dict(config.build(build_backbone(BackboneConfig(name="resnet18")), 3).state_dict())
    checkpoint, _ = mmdet_checkpoint(
        DetectorFile(**{**vars(detector_file("detr")), "detector": config, "state_dict": state})
    )
    encoder, decoder = (
        {"transformerlayers": {"operation_order": order.split()}}
        for order in ("norm self_attn norm ffn", "self_attn norm cross_attn norm ffn norm")
    )
    mixed = {"bbox_head": {"transformer": {"encoder": encoder, "decoder": decoder}}}
    with pytest.raises(
        WeightsError, match="norms first in one of .*encoder.* and .*decoder.*, our detr in both or none"
    ):
        convert(Checkpoint(FILE, checkpoint["state_dict"], {"config": f"model = {mixed}"}), style="pytorch")


def test_frozen_norms_have_no_counters() -> None:
    tensors = {name: t for name, t in mmdet_tensors("retinanet").items() if "num_batches_tracked" not in name}
    again = convert(Checkpoint(FILE, tensors, {}), style="pytorch")
    assert again.state_dict["backbone.bn1.num_batches_tracked"] == 0
    assert again.num_tensors == len(tensors)


def mmdet_swin(body: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmdetection's names of torchvision's tensors; its patch merging sees the 2 x 2 cells in another order."""
    theirs = {}
    for name, value in body.items():
        stage = re.match(r"features\.(\d)\.", name)
        number = int(stage[1]) if stage else 0
        if number % 2 == 1:
            name = re.sub(r"features\.\d\.(\d+)\.", rf"stages.{number // 2}.blocks.\1.", name)
            name = name.replace(".attn.", ".attn.w_msa.")
            name = name.replace(".mlp.0.", ".ffn.layers.0.0.").replace(".mlp.3.", ".ffn.layers.1.")
        elif number:
            name = name.replace(f"features.{number}.", f"stages.{number // 2 - 1}.downsample.")
            cells = value.unflatten(-1, (2, 2, -1))  # (..., column, row, C)
            value = cells.transpose(-1, -3).flatten(-3)  # (..., C, row, column)
        name = re.sub(r"^norm\.", "norm3.", name)
        name = name.replace("features.0.0.", "patch_embed.projection.").replace("features.0.2.", "patch_embed.norm.")
        theirs[f"backbone.{name}"] = value
    return theirs


def test_swin_is_renamed() -> None:
    torch.manual_seed(7)
    body = build_backbone(BackboneConfig(name="swin_t")).state_dict()
    tensors = {n: t for n, t in mmdet_tensors("retinanet").items() if not n.startswith("backbone.")}
    for level, width in enumerate((192, 384, 768)):
        tensors[f"neck.lateral_convs.{level}.conv.weight"] = torch.rand(8, width, 1, 1)
    tensors["neck.fpn_convs.3.conv.weight"] = torch.rand(8, 768, 3, 3)
    tensors |= {name: value for name, value in mmdet_swin(body).items() if ".norm0." not in name}  # c2 is not used
    again = convert(Checkpoint(FILE, tensors, {}), style="pytorch")
    indices = [name for name in tensors if name.endswith("relative_position_index")]
    assert again.backbone.name == "swin_t" and list(again.left_out) == indices and len(indices) == 12
    assert all(torch.equal(again.state_dict[f"backbone.{name}"], value) for name, value in body.items())


# ---- AlignDet's own, pre-trained ----


def pretrained_tensors(family: str, *, embedding: tuple[int, ...]) -> dict[str, Tensor]:
    """One detector as AlignDet pre-trains it: a projector in the place of the class predictor."""
    predictor = {"retinanet": "bbox_head.retina_cls", "fcos": "bbox_head.conv_cls", "detr": "bbox_head.projector"}
    names = [predictor.get(family, "roi_head.bbox_head.fc_cls")]
    if family == "cascade-rcnn":
        names = [f"roi_head.bbox_head.{head}.fc_cls" for head in range(3)]
    replaced = (*(f"{name}." for name in names), "roi_head.mask_head.")
    tensors = {n: t for n, t in mmdet_tensors(family).items() if not n.startswith(replaced)}
    width = CONFIGS[family].model_dump().get("head_features") or CONFIGS[family].model_dump().get("neck_channels", 16)
    shapes = {"0.weight": (width, width, *embedding), "0.bias": (width,), "2.bias": (32,)}
    shapes["2.weight"] = (32, width, *([1] * len(embedding)))
    return {**tensors, **{f"{name}.{part}": torch.rand(shape) for name in names for part, shape in shapes.items()}}


@pytest.mark.parametrize(
    ("family", "embedding", "unused"),
    [
        ("retinanet", (1, 1), {}),
        ("fcos", (3, 3), {"projector of another form": 4}),  # looks at the neighbours of a point
        ("mask-rcnn", (), {"box offsets by number of the instance, which mean nothing elsewhere": 2}),
        ("cascade-rcnn", (), {}),  # as their selfsup/htc.py, which has no mask heads
        ("detr", (), {"classes of pre-training": 2}),
    ],
)
def test_pretrained_checkpoint_of_the_authors(family: str, embedding: tuple[int, ...], unused: dict) -> None:
    inner = pretrained_tensors(family, embedding=embedding)
    copies = {f"{copy}.{n}": t for copy in ("online_backbone", "target_backbone", "backbone") for n, t in inner.items()}
    again = convert(Checkpoint(FILE, copies, {}))
    assert (again.layout, again.stage, again.num_classes) == ("aligndet", "pretrain-box", 0)
    reasons = list(again.left_out.values())
    copied = {"momentum copy of the detector": len(inner), "second name of the detector": len(inner)}
    assert {reason: reasons.count(reason) for reason in set(reasons)} == copied | unused
    assert set(again.left_out) < set(copies)
    assert len(copies) - len(again.left_out) == len(again.state_dict) + len(again.projector) - _counted_once(again)
    hidden = {name for name in again.projector if name.endswith("hidden.weight")}
    assert len(hidden) == {"fcos": 0, "cascade-rcnn": 3}.get(family, 1)
    assert not any(name.startswith(("class_predictor", "mask_")) for name in again.state_dict)
    original = detector_file(family).state_dict
    assert all(torch.equal(tensor, original[name]) for name, tensor in again.state_dict.items())


def _counted_once(again: object) -> int:
    """The factors of FCOS's five levels are five tensors there and one here."""
    return -4 if again.detector.family == "fcos" else 0


def test_extracted_weights_and_which_rcnn_they_are() -> None:
    tensors = {n: t for n, t in pretrained_tensors("faster-rcnn", embedding=()).items() if "fc_" not in n}
    assert convert(Checkpoint(FILE, tensors, {})).detector.family == "mask-rcnn"
    again = convert(Checkpoint(FILE, tensors, {}), family="faster-rcnn")
    assert (again.detector.family, again.stage, again.left_out) == ("faster-rcnn", "pretrain-box", {})
    assert "box_predictor.weight" not in again.state_dict


# ---- refusals ----

CAFFE = "model = dict(backbone=dict(style='caffe'))"
OLD_CAFFE = f"{CAFFE}\nnorm = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)"


def changed(family: str, changes: dict[str, Tensor | None]) -> dict[str, Tensor]:
    tensors = {**mmdet_tensors(family), **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "meta", "said"),
    [
        (lambda: {"conv1.weight": torch.zeros(1)}, {}, "not a detector but a backbone alone; .* --backbone-weights"),
        (lambda: {"bbox_head.vfnet_cls.weight": torch.zeros(1)}, {}, "none of the detectors that can be imported"),
        (lambda: mmdet_tensors("fcos"), {"config": CAFFE}, "style='caffe', but no mean"),
        (lambda: mmdet_tensors("fcos"), {"config": OLD_CAFFE}, r"mean 122.77, 115.95, 102.98 \(RGB\) subtracted"),
        (lambda: changed("fcos", {"bbox_head.conv_dcn.weight": torch.zeros(1)}), {}, "1 tensors .*conv_dcn"),
        (lambda: changed("fcos", {"bbox_head.conv_reg.weight": None}), {}, "sides.weight.* missing"),
        (lambda: changed("fcos", {"bbox_head.conv_reg.weight": torch.zeros(1)}), {}, "of another shape"),
        (lambda: changed("fcos", {"neck.lateral_convs.0.conv.weight": None}), {}, "has no neck.pyramid.inner_bl"),
        (
            lambda: changed("fcos", {"backbone.layer3.5.conv1.weight": torch.zeros(1)}),
            {},
            "is none that `aligndet ls backbones` lists",
        ),
    ],
)
def test_what_cannot_be_represented_is_one_line(tensors: object, meta: dict, said: str) -> None:
    with pytest.raises(WeightsError) as caught:
        convert(Checkpoint(FILE, tensors(), meta))
    line = str(caught.value)
    assert line.startswith("some.pth: ") and "\n" not in line
    assert re.search(said, line), line


def test_flags_that_contradict_the_file() -> None:
    checkpoint = Checkpoint(FILE, mmdet_tensors("fcos"), {})
    with pytest.raises(ConfigError, match="is a fcos, not a retinanet; change --detector"):
        convert(checkpoint, family="retinanet")
    with pytest.raises(ConfigError, match="--from detr: some.pth is of mmdet"):
        convert(checkpoint, layout="detr")
    assert (
        convert(checkpoint, layout="aligndet", style="pytorch").detector.family == "fcos"
    )  # written with mmdetection's names
