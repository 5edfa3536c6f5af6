"""What SoCo, UP-DETR and DETReg pre-trained computes the same after import; no tensor of their files is overlooked."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, interpolate, linear

from aligndet_cli.backbones import WeightsTraining, build_backbone
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.checkpoint import DetectorFile, load_finder, read_detector, write_detector
from aligndet_cli.detectors.detr import DETR
from aligndet_cli.detectors.parts.transformer import encode_position
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.finetune.transfer import MODULE_NAMES, modules_to_restart, transfer
from aligndet_cli.tools.conversion import published_detectron2
from aligndet_cli.tools.conversion.categories import COCO_BY_ID
from aligndet_cli.tools.conversion.convert import Converted, convert
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from aligndet_cli.tools.conversion.reading import Checkpoint
from aligndet_cli.tools.conversion.rules import translate
from helpers.commandline import aligndet
from helpers.plain_transformer import compose
from helpers.published_files import DETR as DETR_SIZE
from helpers.published_files import RCNN as RCNN_SIZE
from helpers.published_files import detr_tensors, soco_tensors
from helpers.small_detectors import build as build_detector

FILE = Path("some.pth")
Tensors = dict[str, Tensor]


def from_tensors(tensors: Tensors, **options: str) -> Converted:
    converted = convert(Checkpoint(FILE, tensors, {}), **options)
    used = len(tensors) - len(converted.left_out)
    assert set(converted.left_out) <= set(tensors)
    counters = sum(name.endswith("num_batches_tracked") for name in converted.state_dict)
    has_counters = any(name.endswith("num_batches_tracked") for name in tensors)
    assert used == len(converted.state_dict) - (0 if has_counters else counters)  # each is one of ours
    return converted


def build(converted: Converted) -> Detector:
    model = converted.detector.build(build_backbone(converted.backbone), converted.num_classes or 1)
    model.load_state_dict(converted.state_dict, strict=False)
    return model.eval()


# ---- SoCo ----


def norm(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    mean, variance, weight, bias = (
        tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return batch_norm(x, mean, variance, weight, bias)


def soco_pyramid(tensors: Tensors, maps: list[Tensor]) -> list[Tensor]:
    """Lateral convolutions, the way down, and 3x3 convolutions; each with its norm."""
    sides = []
    for level, one in enumerate(maps):
        block = f"neck.lateral_convs.{level}"
        sides.append(norm(tensors, f"{block}.bn", conv2d(one, tensors[f"{block}.conv.weight"])))
    for level in (2, 1, 0):
        sides[level] = sides[level] + interpolate(sides[level + 1], size=sides[level].shape[2:], mode="nearest")
    blocks = [f"neck.fpn_convs.{level}" for level in range(4)]
    return [
        norm(tensors, f"{block}.bn", conv2d(one, tensors[f"{block}.conv.weight"], padding=1))
        for block, one in zip(blocks, sides, strict=True)
    ]


def soco_head(tensors: Tensors, pooled: Tensor) -> Tensor:
    for number in range(1, 5):
        hidden = conv2d(pooled, tensors[f"head.conv{number}.weight"], padding=1)
        pooled = norm(tensors, f"head.bn{number}", hidden).relu()
    return linear(pooled.flatten(1), tensors["head.fc1.weight"], tensors["head.fc1.bias"]).relu()


@torch.no_grad()
def test_soco_computes_the_same() -> None:
    tensors = soco_tensors()
    converted = from_tensors(tensors)
    assert (converted.layout, converted.stage, converted.detector.family) == ("soco", "pretrain-box", "mask-rcnn")
    detector = converted.detector
    assert (detector.neck_norm, detector.head_norm, detector.head_convs, detector.head_fcs) == ("batch", "batch", 4, 1)
    assert (detector.neck_channels, detector.head_features) == (RCNN_SIZE.channels, RCNN_SIZE.features)
    reasons = {name.partition(".")[0]: why for name, why in converted.left_out.items()}
    assert reasons == {
        **dict.fromkeys(("encoder_k", "neck_k", "head_k", "projector_k"), "momentum copy of the detector"),
        **dict.fromkeys(("projector", "predictor"), "embeds boxes, in pre-training only"),
    }
    modules = {name.partition(".")[0] for name in converted.state_dict}
    assert modules == {"backbone", "neck", "head"}  # no RPN, no predictors, no mask head

    model = build(converted)
    body = {f"encoder.{name}": value for name, value in model.backbone.state_dict().items()}
    assert body and all(torch.equal(tensors[name], value) for name, value in body.items())
    maps = {f"c{n + 2}": torch.randn(2, 64 * 2**n, 16 // 2**n, 24 // 2**n) for n in range(4)}
    for ours, theirs in zip(model.neck(maps), soco_pyramid(tensors, list(maps.values())), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    pooled = torch.randn(3, RCNN_SIZE.channels, 7, 7)
    torch.testing.assert_close(model.head(pooled), soco_head(tensors, pooled), rtol=1e-5, atol=1e-5)


def for_detectron2(tensors: Tensors) -> Tensors:
    """As SoCo's `current_detectron2_Head.pkl`: the trained parts, levels by their strides, norms in convolutions."""
    renamed = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        rest = re.sub(r"bn(\d)", r"conv\1.norm", rest)
        if part == "encoder":
            rest = rest.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            stage = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", rest)
            renamed[stage if stage != rest else f"stem.{rest}"] = value
        elif part == "neck":
            kind, level, leaf = re.match(r"(lateral|fpn)_convs\.(\d)\.(.*)", rest).groups()
            leaf = leaf.replace("bn.", "norm.").replace("conv.", "")
            renamed[f"fpn_{'output' if kind == 'fpn' else kind}{int(level) + 2}.{leaf}"] = value
        elif part == "head":
            renamed[f"box_head.{rest}"] = value
    return renamed


def for_mmdetection(tensors: Tensors) -> Tensors:
    """As SoCo's `current_mmdetection_Head.pth`."""
    renamed = {}
    for name, value in tensors.items():
        if name.startswith("head."):
            name = re.sub(r"(conv|bn)(\d)\.", lambda m: f"shared_convs.{int(m[2]) - 1}.{m[1]}.", name)
            name = name.replace("fc1.", "shared_fcs.0.").replace("head.", "roi_head.bbox_head.", 1)
        if name.startswith(("encoder.", "neck.", "roi_head.")):
            renamed[name.replace("encoder.", "backbone.", 1)] = value
    return renamed


@pytest.mark.parametrize("form", [for_detectron2, for_mmdetection])
def test_converted_files_of_soco_hold_the_same(form: Callable[[Tensors], Tensors]) -> None:
    tensors = soco_tensors()
    expected, again = from_tensors(tensors), from_tensors(form(tensors))
    assert (again.layout, again.detector, again.left_out) == ("soco", expected.detector, {})
    assert again.state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(again.state_dict[name], value) for name, value in expected.state_dict.items())


def test_soco_starts_a_faster_rcnn_too_and_goes_to_mmdetection_and_back() -> None:
    converted = from_tensors(soco_tensors(), family="faster-rcnn")
    assert converted.detector.family == "faster-rcnn" and not converted.num_classes
    content = DetectorFile("pretrain-box", converted.detector, converted.backbone, (), None, converted.state_dict)
    checkpoint, left_out = mmdet_checkpoint(content)
    again = convert(Checkpoint(FILE, checkpoint["state_dict"], checkpoint["meta"]))
    assert not left_out and again.detector == converted.detector
    assert all(torch.equal(again.state_dict[name], value) for name, value in converted.state_dict.items())
    with pytest.raises(ConfigError, match="is a mask-rcnn, not a retinanet; .* alone: .* retinanet --backbone-w"):
        from_tensors(soco_tensors(), family="retinanet")


def test_what_soco_has_not_pretrained_starts_fresh(tmp_path: Path) -> None:
    converted = from_tensors(soco_tensors())
    content = DetectorFile("pretrain-box", converted.detector, converted.backbone, (), None, converted.state_dict)
    for categories in ((Category(1, "cell"),), (Category(1, "cell"), Category(2, "disc"))):
        model = converted.detector.build(build_backbone(converted.backbone), len(categories))
        restart = modules_to_restart(model, content, categories, keep_box_predictor=True)
        report = transfer(model, converted.state_dict, modules=MODULE_NAMES, restart=restart)
        assert report.share == 1.0 and not any(part.missing or part.unexpected for part in report.modules.values())
        restarted = {name for name, part in report.modules.items() if part.restarted and not part.matched}
        assert restarted == {"rpn", "class_predictor", "box_predictor", "mask_head", "mask_predictor"}
    write_detector(tmp_path / "weights.pt", content)
    with pytest.raises(WeightsError, match="has no score for objects without classes"):
        load_finder(tmp_path / "weights.pt")


def test_a_mask_rcnn_that_soco_finetuned_with_detectron2() -> None:
    """Its published `model_final.pth` has batch norm in pyramid, box head and mask head, and RGB images."""
    model = build_detector("mask-rcnn")
    state = model.state_dict()
    assert (model.config.neck_norm, model.config.head_norm) == ("batch", "batch")
    tensors = {translate(name, published_detectron2.RULES["mask-rcnn"], to_ours=False): t for name, t in state.items()}
    parts = ("backbone.fpn_lateral2", "roi_heads.box_head.conv1", "roi_heads.mask_head.mask_fcn1")
    assert {f"{part}.norm.running_var" for part in parts} <= tensors.keys()
    tensors["pixel_mean"] = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    tensors["pixel_std"] = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    again = convert(Checkpoint(FILE, tensors, {}))
    assert (again.layout, again.stage, list(again.left_out)) == ("detectron2", "finetune", ["pixel_mean", "pixel_std"])
    assert again.detector == model.config and not again.backbone.stride_in_1x1
    for name, value in state.items():
        torch.testing.assert_close(again.state_dict[name], value, rtol=1e-6, atol=0)


# ---- DETRs ----


@pytest.mark.parametrize(
    ("kind", "pre_norm", "unused"),
    [
        ("up-detr", True, {"class_embed": 2, "patch2query": 2, "feature_align": 4}),
        ("detreg", True, {"class_embed": 2, "feature_embed": 4}),
        ("detreg", False, {"class_embed": 2, "feature_embed": 4}),
        ("detr", True, {}),
    ],
)
@torch.no_grad()
def test_detrs_compute_the_same(kind: str, pre_norm: bool, unused: dict[str, int]) -> None:
    tensors = detr_tensors(kind, pre_norm=pre_norm)
    converted = from_tensors(tensors)
    assert (converted.layout, converted.stage) == (kind, "pretrain-box" if unused else "finetune")
    assert converted.detector.pre_norm == pre_norm and converted.num_classes == (0 if unused else 91)
    parts = [name.partition(".")[0] for name in converted.left_out]
    assert {part: parts.count(part) for part in parts} == unused

    model = build(converted)
    assert isinstance(model, DETR)
    is_inside = torch.ones(2, 4, 6, dtype=torch.bool)
    is_inside[1, 3:] = is_inside[1, :, 4:] = False
    maps = torch.randn(2, 512, 4, 6)
    cells = conv2d(maps, tensors["input_proj.weight"], tensors["input_proj.bias"])
    theirs = compose(
        {name.removeprefix("transformer."): value for name, value in tensors.items()},
        cells.flatten(2).transpose(1, 2),
        encode_position(is_inside, DETR_SIZE.dim).flatten(1, 2),
        ~is_inside.flatten(1),
        tensors["query_embed.weight"],
        heads=DETR_SIZE.heads,
    )
    hidden = model.attend(model.neck(maps), is_inside)
    torch.testing.assert_close(hidden, theirs, rtol=1e-5, atol=1e-5)
    for number in range(3):
        theirs = linear(theirs, *(tensors[f"bbox_embed.layers.{number}.{part}"] for part in ("weight", "bias")))
        theirs = theirs.relu() if number < 2 else theirs.sigmoid()
    torch.testing.assert_close(model.predict(hidden)[1], theirs, rtol=1e-5, atol=1e-5)
    body = {f"backbone.0.body.{name}": value for name, value in model.backbone.state_dict().items()}
    assert all(torch.equal(tensors[name], value) for name, value in body.items() if "num_batches" not in name)


# ---- from file to fine-tuning ----


@pytest.mark.parametrize(
    ("kind", "recipe", "rates"),
    [
        ("soco", "soco", ("SoCo recipe, 0.02 x 16/16", "2.5e-05 (SoCo recipe)")),
        ("up-detr", "up-detr", ("UP-DETR recipe, 0.0001 x 16/16", "0.0001 (UP-DETR recipe)")),
        ("detreg", "default", ("DETR recipe after pre-training, 0.0001 x 16/16", "0.0001 (DETR recipe")),
    ],
)
def test_finetune_takes_them(kind: str, recipe: str, rates: tuple[str, str], toy: Path, tmp_path: Path) -> None:
    file, workspace = tmp_path / "published.pth", tmp_path / "workspace"
    tensors = soco_tensors() if kind == "soco" else detr_tensors(kind)
    torch.save({"model": {f"module.{name}": value for name, value in tensors.items()}, "epoch": 59}, file)
    ran = aligndet("import-weights", file, "-w", workspace, "--name", "start", "--json").json()
    assert (ran["result"]["layout"], ran["result"]["tensors"]) == (kind, len(tensors))
    assert ran["result"]["epochs"] == (59 if kind == "soco" else 60)  # SoCo counts from 1
    run = workspace / "pretrain-box" / "start"
    report = json.loads((run / "load_report.json").read_text())
    assert report["used"] + len(report["left_out"]) == len(tensors)
    written = read_detector(run / "weights.pt")
    assert written.backbone_training == WeightsTraining("SoCo" if kind == "soco" else "SwAV")
    words = ["--init", run / "weights.pt", "--detector", written.detector.family, "--dry-run", "--json"]
    effective = aligndet("finetune", toy, "-w", workspace, *words).json()["effective"]
    assert effective["recipe"].partition(" ")[0] == recipe
    assert rates[0] in effective["learning rate"] and effective["weight decay"].startswith(rates[1])
    if kind == "up-detr":
        assert effective["optimizer"] == "adamw, backbone at 0.5 times the rate"


def test_a_finetuned_pre_norm_detr_has_cocos_classes(tmp_path: Path) -> None:
    torch.save({"model": detr_tensors("detr")}, tmp_path / "finetuned.pth")
    aligndet("import-weights", tmp_path / "finetuned.pth", "-w", tmp_path, "--name", "done")
    done = read_detector(tmp_path / "finetune/done/weights.pt")
    assert done.categories == COCO_BY_ID and done.detector.pre_norm and done.recipe is None


# ---- refusals ----


def without(tensors: Tensors, name: str) -> Tensors:
    assert name in tensors
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "name",
    [
        *("encoder.layer2.0.conv1.weight", "encoder.bn1.running_var", "head.bn3.bias", "head.conv4.weight"),
        *("neck.lateral_convs.2.bn.running_mean", "neck.fpn_convs.3.conv.weight", "head.fc1.weight", "head.fc1.bias"),
        *("transformer.encoder.norm.weight", "transformer.decoder.layers.1.norm3.bias", "query_embed.weight"),
        *("bbox_embed.layers.2.weight", "input_proj.bias", "backbone.0.body.layer4.1.conv2.weight"),
        "transformer.encoder.layers.0.self_attn.in_proj_weight",
    ],
)
def test_a_missing_tensor_or_one_of_another_shape_is_refused(name: str) -> None:
    tensors = soco_tensors() if name.startswith(("encoder.", "neck.", "head.")) else detr_tensors("up-detr")
    for changed in (without(tensors, name), tensors | {name: torch.zeros(())}, tensors | {name: torch.zeros(3, 2)}):
        with pytest.raises(WeightsError, match=r"^some\.pth: [^\n]+$"):
            convert(Checkpoint(FILE, changed, {}))


def test_mixed_files_and_other_detrs_are_refused() -> None:
    soco, up_detr = soco_tensors(), detr_tensors("up-detr")
    detreg = {name: t for name, t in detr_tensors("detreg").items() if name.startswith("feature_embed.")}
    refused = (
        (soco | for_detectron2(soco), "tensors .* belong to no mask-rcnn of ours"),
        (soco | {"queue": torch.zeros(2)}, r"1 tensors \(queue\) belong to no mask-rcnn"),
        (up_detr | detreg, r"4 tensors \(feature_embed.* belong to no detr of ours"),
        (up_detr | soco, "belong to no detr of ours"),
        ({**detr_tensors("detr"), "transformer.level_embed": torch.zeros(4, 16)}, "a Deformable DETR"),
        ({n: t for n, t in soco.items() if not n.startswith(("neck", "head"))}, "a backbone alone"),
    )
    for tensors, said in refused:
        with pytest.raises(WeightsError, match=f"some.pth: .*{said}"):
            convert(Checkpoint(FILE, tensors, {}))
    with pytest.raises(ConfigError, match="--style: some.pth is of soco, which has one only"):
        from_tensors(soco, style="caffe")
    with pytest.raises(ConfigError, match="--from detr: some.pth is of up-detr; leave out --from"):
        from_tensors(up_detr, layout="detr")
