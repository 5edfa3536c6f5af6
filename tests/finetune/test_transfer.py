from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors import Detector
from aligndet_cli.detectors.checkpoint import read_detector
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.finetune.transfer import modules_to_restart, parse_modules, transfer
from helpers.small_detectors import save_detector

EVERYTHING = parse_modules(["neck", "rpn", "head"])


def tiny(classes: int, *, norm: bool) -> nn.Module:
    """A detector's outline: backbone 2 tensors, neck convolution with bias or norm, head, two predictors."""
    torch.manual_seed(classes)
    neck = nn.Sequential(nn.Conv2d(2, 2, 1, bias=not norm), *([nn.BatchNorm2d(2)] if norm else []))
    return nn.ModuleDict(
        {
            "backbone": nn.Conv2d(3, 2, 1),
            "neck": nn.ModuleDict({"block": neck}),
            "head": nn.Conv2d(2, 2, 1),
            "class_predictor": nn.Conv2d(2, classes, 1),
            "box_predictor": nn.Conv2d(2, 4, 1),
        }
    )


def source_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("class_predictor")}


def test_all_but_the_class_predictor_arrives() -> None:
    source, model = source_of(tiny(1, norm=False)), tiny(5, norm=False)
    report = transfer(model, source, modules=EVERYTHING, restart={"class_predictor"})
    assert report.share == 1.0
    assert {name: part.matched for name, part in report.modules.items()} == {
        "backbone": 2,
        "neck": 2,
        "head": 2,
        "class_predictor": 0,
        "box_predictor": 2,
    }
    assert report.modules["class_predictor"].restarted == ["class_predictor.weight", "class_predictor.bias"]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in source.items())


def test_a_bias_becomes_the_shift_of_the_norm_that_replaces_it() -> None:
    source, model = source_of(tiny(1, norm=False)), tiny(5, norm=True)
    report = transfer(model, source, modules=EVERYTHING, restart={"class_predictor"})
    state = model.state_dict()
    assert torch.equal(state["neck.block.1.bias"], source["neck.block.0.bias"])
    assert torch.equal(state["neck.block.1.weight"], torch.ones(2))
    assert report.share == 1.0 and not report.modules["neck"].missing and not report.modules["neck"].unexpected
    assert "neck.block.1.running_mean" in report.modules["neck"].restarted


def test_modules_not_asked_for_stay_fresh() -> None:
    source, model = source_of(tiny(1, norm=False)), tiny(5, norm=False)
    head = model.state_dict()["head.weight"].clone()
    report = transfer(model, source, modules=parse_modules(["neck"]), restart={"class_predictor"})
    assert torch.equal(model.state_dict()["head.weight"], head)
    assert torch.equal(model.state_dict()["backbone.weight"], source["backbone.weight"])
    assert report.modules["head"].restarted and report.modules["box_predictor"].restarted and report.share == 1.0


def test_misfits_are_told_apart_and_refused() -> None:
    source, model = source_of(tiny(1, norm=False)), tiny(5, norm=False)
    source["head.weight"] = torch.zeros(7, 7)
    del source["backbone.bias"]
    source["head.extra"] = torch.zeros(1)
    report = transfer(model, source, modules=EVERYTHING, restart={"class_predictor"})
    assert report.modules["head"].mismatched == ["head.weight (7, 7) -> (2, 2, 1, 1)"]
    assert report.modules["backbone"].missing == ["backbone.bias"]
    assert report.modules["head"].unexpected == ["head.extra"]
    # wanted: backbone 6 + 2, neck 4 + 2, head 4 + 2, box predictor 8 + 4 = 32 values; lost: 2 + 4
    assert report.share == pytest.approx(26 / 32)
    with pytest.raises(WeightsError, match=r"81\.2% of the weights match.*backbone\.bias.*--min-match"):
        report.check(0.9, "weights.pt")
    report.check(0.8, "weights.pt")


def test_unknown_module_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="'nek' is not one of backbone, neck, rpn, head"):
        parse_modules(["nek"])


CATS = (Category(3, "cat"), Category(4, "dog"))


def small_mask_rcnn(num_classes: int) -> tuple[MaskRCNNConfig, BackboneConfig, Detector]:
    config = MaskRCNNConfig(neck_channels=32, head_convs=1, head_features=64, mask_convs=1)
    backbone = BackboneConfig(name="resnet18")
    return config, backbone, config.build(build_backbone(backbone), num_classes)


@pytest.mark.parametrize(
    ("stage", "source_categories", "categories", "restarted"),
    [
        ("pretrain-box", (), CATS, {"mask_head", "mask_predictor", "class_predictor", "box_predictor"}),
        # offsets of "object" fit the one class there is
        ("pretrain-box", (), CATS[:1], {"mask_head", "mask_predictor", "class_predictor"}),
        ("finetune", CATS, CATS, set()),
        ("finetune", CATS[:1], CATS, {"mask_predictor", "class_predictor", "box_predictor"}),
    ],
)
def test_what_pretraining_leaves_alone_and_other_classes_restart(
    tmp_path: Path, stage: str, source_categories: tuple, categories: tuple, restarted: set[str]
) -> None:
    config, backbone, source_model = small_mask_rcnn(max(len(source_categories), 1))
    file = tmp_path / "weights.pt"
    save_detector(file, source_model, stage=stage, configs=(config, backbone), categories=source_categories)
    source, model = read_detector(file), small_mask_rcnn(len(categories))[2]
    restart = modules_to_restart(model, source, categories, keep_box_predictor=True)
    report = transfer(model, source.state_dict, modules=EVERYTHING, restart=restart)
    assert {name for name, part in report.modules.items() if part.restarted} == restarted
    assert report.share == 1.0
    assert not any(part.missing or part.mismatched for part in report.modules.values())
    if stage == "pretrain-box":
        assert {name.partition(".")[0] for name in source.state_dict} == set(report.modules) - {
            *("mask_head", "mask_predictor", "class_predictor")
        }
    without = modules_to_restart(model, source, categories, keep_box_predictor=False)
    assert without == restart | {"box_predictor"}


def test_what_a_method_of_pretraining_left_out_restarts(tmp_path: Path) -> None:
    config, backbone, model = small_mask_rcnn(1)
    file = tmp_path / "weights.pt"
    save_detector(file, model, stage="pretrain-box", configs=(config, backbone))
    source = read_detector(file)
    trained = {
        name: value for name, value in source.state_dict.items() if not name.startswith(("rpn.", "box_predictor."))
    }
    restart = modules_to_restart(model, replace(source, state_dict=trained), CATS[:1], keep_box_predictor=True)
    assert restart == {"mask_head", "mask_predictor", "class_predictor", "rpn", "box_predictor"}
    # What is missing without being left out by a method is told, not restarted.
    neckless = {name: value for name, value in source.state_dict.items() if not name.startswith("neck.")}
    assert "neck" not in modules_to_restart(model, replace(source, state_dict=neckless), CATS, keep_box_predictor=True)
