"""The explicit list of what starts afresh in fine-tuning after pre-training, for every detector family."""

from pathlib import Path

import pytest
import torch

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors import DETECTORS, settle_neck_norm
from aligndet_cli.detectors.checkpoint import read_detector
from aligndet_cli.finetune.transfer import modules_to_restart, parse_modules, transfer
from helpers.small_detectors import SMALL, save_detector

CATEGORIES = tuple(Category(number, f"class {number}") for number in range(1, 4))
RESNET = BackboneConfig(name="resnet18")


def tensors(module: str) -> set[str]:
    return {f"{module}.weight", f"{module}.bias"}


def neck_norms(*blocks: str) -> set[str]:
    """Statistics and scale of the norms that fine-tuning adds; their shift is the bias of pre-training."""
    parts = ("weight", "running_mean", "running_var", "num_batches_tracked")
    return {f"neck.pyramid.{block}.1.{part}" for block in blocks for part in parts}


THREE_LEVELS = [f"{kind}_blocks.{level}" for kind in ("inner", "layer") for level in range(3)]
FOUR_LEVELS = [f"{kind}_blocks.{level}" for kind in ("inner", "layer") for level in range(4)]
EXTRA = ("extra_blocks.p6", "extra_blocks.p7")
BOXES_OF_CLASSES = {*tensors("class_predictor"), *tensors("box_predictor")}
CLASSES_OF_CASCADE = {name for head in range(3) for name in tensors(f"class_predictor.{head}")}
MASKS = {f"mask_head.{layer}.{part}" for layer in ("convs.0.0", "upsample") for part in ("weight", "bias")}
MASKS_OF_CASCADE = {name.replace("mask_head.", f"mask_head.{head}.") for head in range(3) for name in MASKS}
MASKS_OF_CASCADE |= {name for head in range(3) for name in tensors(f"mask_predictor.{head}")}
FLOW = {f"mask_flow.{head}.0.{part}" for head in (1, 2) for part in ("weight", "bias")}
RESTARTED = {
    "cascade-mask-rcnn": CLASSES_OF_CASCADE | neck_norms(*FOUR_LEVELS) | MASKS_OF_CASCADE,
    "cascade-rcnn": CLASSES_OF_CASCADE | neck_norms(*FOUR_LEVELS),  # boxes are class-agnostic
    "detr": tensors("class_predictor"),
    "faster-rcnn": BOXES_OF_CLASSES | neck_norms(*FOUR_LEVELS),
    "htc": CLASSES_OF_CASCADE | neck_norms(*FOUR_LEVELS) | MASKS_OF_CASCADE | FLOW,
    "fcos": tensors("class_predictor") | neck_norms(*THREE_LEVELS, *EXTRA),
    "mask-rcnn": BOXES_OF_CLASSES | neck_norms(*FOUR_LEVELS) | MASKS | tensors("mask_predictor"),
    "retinanet": tensors("class_predictor") | neck_norms(*THREE_LEVELS, *EXTRA),
}


@pytest.mark.parametrize("family", sorted(DETECTORS))
def test_everything_else_arrives(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pretrained_config = settle_neck_norm(SMALL[family], "none")
    pretrained = pretrained_config.build(build_backbone(RESNET), 1)
    save_detector(tmp_path / "weights.pt", pretrained, stage="pretrain-box", configs=(pretrained_config, RESNET))
    source = read_detector(tmp_path / "weights.pt")
    torch.manual_seed(1)
    model = settle_neck_norm(SMALL[family], "batch").build(build_backbone(RESNET), len(CATEGORIES))
    restart = modules_to_restart(model, source, CATEGORIES, keep_box_predictor=True)
    report = transfer(model, source.state_dict, modules=parse_modules(["neck", "rpn", "head"]), restart=restart)
    assert {key for part in report.modules.values() for key in part.restarted} == RESTARTED[family]
    assert report.share == 1.0
    assert not any(part.missing or part.mismatched for part in report.modules.values())


def test_both_linked_backbones_arrive(tmp_path: Path) -> None:
    both = BackboneConfig(name="cb-resnet18")
    config = settle_neck_norm(SMALL["cascade-rcnn"], "none")
    torch.manual_seed(0)
    pretrained = config.build(build_backbone(both), 1)
    save_detector(tmp_path / "weights.pt", pretrained, stage="pretrain-box", configs=(config, both))
    source = read_detector(tmp_path / "weights.pt")
    torch.manual_seed(1)
    model = config.build(build_backbone(both), len(CATEGORIES))
    restart = modules_to_restart(model, source, CATEGORIES, keep_box_predictor=True)
    report = transfer(model, source.state_dict, modules=parse_modules(["neck", "rpn", "head"]), restart=restart)
    assert {key for part in report.modules.values() for key in part.restarted} == CLASSES_OF_CASCADE
    assert report.share == 1.0
    of_backbone = [name for name in model.state_dict() if name.startswith("backbone.")]
    assert {name.split(".")[1] for name in of_backbone} == {"assistant", "lead", "links"}
    assert all(torch.equal(model.state_dict()[name], pretrained.state_dict()[name]) for name in of_backbone)
