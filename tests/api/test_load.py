"""`load` builds what `finetune` builds before its first step, and `backbone` the backbone in it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import aligndet_cli as aligndet
from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.detectors.checkpoint import load_detector, read_detector, write_detector
from aligndet_cli.detectors.recipes import RCNN
from helpers.small_detectors import SMALL, save_detector

NAMES = ["disc", "square", "triangle", "star", "cross"]


def pretrained(family: str, file: Path, recipe: str | None = None) -> Path:
    """The file of a pre-training of a small detector."""
    torch.manual_seed(3)
    has_neck = "neck_norm" in type(SMALL[family]).model_fields
    detector = SMALL[family].model_copy(update={"neck_norm": "none"} if has_neck else {})
    configs = (detector, BackboneConfig(name="resnet18", weights="none"))
    model = configs[0].build(build_backbone(configs[1]), 1)
    save_detector(file, model, stage="pretrain-box", configs=configs, recipe=recipe)  # type: ignore[arg-type]
    return file


@pytest.mark.parametrize("family", SMALL)
def test_it_is_what_finetune_starts_from(family: str, toy: Path, tmp_path: Path) -> None:
    file = pretrained(family, tmp_path / "weights.pt", "self-supervised" if family in RCNN else None)
    sides = {"short_side": [64], "long_side": 96}
    seed = 4
    run = aligndet.finetune(
        {"resolution": sides, "init": str(file), "training.lr": 1e-30, "training.weight_decay": 0.0},
        tmp_path / "workspace",
        data=toy,
        detector=family,
        steps=1,
        batch_size=2,
        seed=seed,
    )
    torch.manual_seed(seed)
    detector = aligndet.load(file, classes=NAMES, config={"resolution": sides})
    trained = read_detector(run.folder / "weights.pt").state_dict
    mine = detector.model.state_dict()
    assert mine.keys() == trained.keys()
    moved = [name for name in mine if "running_" not in name and "num_batches" not in name]
    assert len(moved) > 50
    for name in moved:
        torch.testing.assert_close(mine[name], trained[name], rtol=0, atol=1e-12)
    if family in RCNN:  # this recipe puts norms into the heads
        assert any("running_mean" in name for name in mine if name.startswith(("roi_head", "box_head", "head")))
    frozen = {name for name, parameter in detector.model.named_parameters() if not parameter.requires_grad}
    settings = json.loads((run.folder / "manifest.json").read_text())["result"]
    count = sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
    assert settings["trained_parameters"] == count, frozen


def test_runs_are_found_by_path_folder_and_name(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = chain / "pretrain-box" / "retinanet-resnet18"
    for run in (folder, str(folder), folder / "weights.pt"):
        assert aligndet.load(run, num_classes=3).names == {1: "1", 2: "2"}
    assert aligndet.load("finetune/retinanet-resnet18", workspace=chain).names[2] == "disc"
    with pytest.raises(
        aligndet.ConfigError, match="write finetune/retinanet-resnet18 or pretrain-box/retinanet-resnet18"
    ):
        aligndet.load("retinanet-resnet18", workspace=chain)
    with pytest.raises(
        aligndet.ConfigError, match="nothing: no such file.*runs in .*: finetune/retinanet-resnet18, pre"
    ):
        aligndet.load("nothing", workspace=chain)
    with pytest.raises(aligndet.ConfigError, match="no finished run is in"):
        aligndet.load("nothing", workspace=tmp_path)
    shutil.copytree(folder, tmp_path / "pretrain-box" / "other")
    monkeypatch.setenv("ALIGNDET_WORKSPACE", str(tmp_path))
    assert len(aligndet.load("other", num_classes=3).names) == 2
    with pytest.raises(aligndet.ConfigError, match="weights='best' chooses nothing"):
        aligndet.load(folder / "weights.pt", weights="best", num_classes=3)
    for run in (None, 7, b"weights.pt"):
        with pytest.raises(aligndet.ConfigError, match=f"run: is of type {type(run).__name__}"):
            aligndet.load(run)  # type: ignore[arg-type]
    with pytest.raises(aligndet.ConfigError, match="no best.pt"):
        aligndet.load(chain / "finetune" / "retinanet-resnet18", weights="best")


def test_classes_of_a_pretrained_detector(chain: Path) -> None:
    run = chain / "pretrain-box" / "retinanet-resnet18"
    assert aligndet.load(run, classes=["cat", "dog"]).names == {1: "cat", 2: "dog"}
    assert aligndet.load(run, num_classes=91).model.class_predictor.out_channels == 9 * 90
    for arguments, words in (
        ({}, "no classes yet; give num_classes or classes"),
        ({"num_classes": 2, "classes": ["cat", "dog"]}, "2 classes and background are 3"),
        ({"num_classes": 1}, "2 at least"),
        ({"classes": "cat"}, "give a list of names"),
        ({"classes": []}, "give a list of names"),
        ({"classes": {"cat", "dog"}}, "give a list of names"),
        ({"classes": {1: "cat"}}, "give a list of names"),
        ({"classes": (name for name in ("cat", "dog"))}, "give a list of names"),
        ({"classes": [1, 2]}, "give a list of names"),
        ({"classes": ["cat", ""]}, "give a list of names"),
        ({"classes": ["cat", "cat"]}, "has a name twice"),
        ({"num_classes": 3.0}, "num_classes=3.0: give a whole number"),
        ({"num_classes": "3"}, "num_classes='3': give a whole number"),
        ({"num_classes": True}, "num_classes=True: give a whole number"),
        ({"num_classes": 3, "config": "mine.toml"}, "config: is of type str"),
        ({"num_classes": 3, "weights": "bset"}, "weights='bset': write 'last' or 'best'"),
    ):
        with pytest.raises(aligndet.ConfigError, match=words):
            aligndet.load(run, **arguments)  # type: ignore[arg-type]


def test_other_classes_restart_what_depends_on_them(chain: Path) -> None:
    run = chain / "finetune" / "retinanet-resnet18"
    own = read_detector(run / "weights.pt").state_dict
    for same in (aligndet.load(run), aligndet.load(run, classes=NAMES), aligndet.load(run, num_classes=12)):
        assert all(torch.equal(value, own[name]) for name, value in same.model.state_dict().items())
        assert same.names == {2: "disc", 3: "square", 5: "triangle", 7: "star", 11: "cross"}
    other = aligndet.load(run, classes=["disc", "ball"])
    changed = [name for name, value in other.model.state_dict().items() if value.shape != own[name].shape]
    assert changed == ["class_predictor.weight", "class_predictor.bias"]
    assert all(torch.equal(other.model.state_dict()[name], own[name]) for name in set(own) - set(changed))


def test_settings_of_finetune(chain: Path) -> None:
    run = chain / "pretrain-box" / "retinanet-resnet18"

    def trained_stages(**config: object) -> int:
        body = aligndet.load(run, num_classes=3, config=config).model.backbone
        return sum(any(p.requires_grad for part in stage for p in part.parameters()) for stage in body.stages())

    assert trained_stages() == 4
    assert trained_stages(**{"backbone.frozen_stages": 2}) == 2
    assert trained_stages(backbone={"method": "supervised"}) == 3  # freezes stem and first stage
    detector = aligndet.load(run, num_classes=3, config={"detector": {"score_threshold": 0.2}})
    assert detector.model.config.score_threshold == 0.2
    own = read_detector(run / "weights.pt").state_dict
    neck_only = aligndet.load(run, num_classes=3, config={"load_modules": ["neck"]}).model.state_dict()
    parts = {part: [name for name in own if part in name and name.endswith(".0.weight")] for part in ("neck.", "tower")}
    arrived = {part: [torch.equal(neck_only[name], own[name]) for name in names] for part, names in parts.items()}
    assert all(arrived["neck."]) and not any(arrived["tower"]) and all(map(len, arrived.values()))
    for config, words in (
        ({"training.lr": 1}, "'training.lr' does not change what is loaded"),
        ({"backbone.frozen": 1}, "backbone.frozen"),
        ({"detector.family": "fcos"}, "is a retinanet, not a fcos"),
    ):
        with pytest.raises(aligndet.ConfigError, match=words):
            aligndet.load(run, num_classes=3, config=config)


def test_a_damaged_detector_is_refused(chain: Path, tmp_path: Path) -> None:
    content = read_detector(chain / "finetune" / "retinanet-resnet18" / "weights.pt")
    tensors = {name: value for name, value in content.state_dict.items() if name != "box_predictor.bias"}
    write_detector(tmp_path / "weights.pt", replace(content, state_dict=tensors))
    with pytest.raises(aligndet.WeightsError, match="need 100%.*box_predictor.bias"):
        aligndet.load(tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(aligndet.WeightsError, match="text.pt"):
        aligndet.load(tmp_path / "text.pt")


def test_the_backbone_of_a_detector(chain: Path) -> None:
    run = chain / "finetune" / "retinanet-resnet18"
    body = aligndet.backbone(run)
    tensors = read_detector(run / "weights.pt").state_dict
    assert all(torch.equal(value, tensors[f"backbone.{name}"]) for name, value in body.state_dict().items())
    assert all(parameter.requires_grad for parameter in body.parameters())
    maps = body.eval()(torch.zeros(2, 3, 64, 96))
    shapes = {"c2": (2, 64, 16, 24), "c3": (2, 128, 8, 12), "c4": (2, 256, 4, 6), "c5": (2, 512, 2, 3)}
    assert {level: tuple(value.shape) for level, value in maps.items()} == shapes
    with pytest.raises(aligndet.WeightsError, match="has a resnet18, not a resnet50"):
        aligndet.backbone(run, "resnet50")


def test_the_backbone_of_a_file_of_its_own(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    state = resnet18().state_dict()
    torch.save(state, tmp_path / "mine.pt")
    body = aligndet.backbone(tmp_path / "mine.pt", "resnet18")
    assert all(torch.equal(value, state[name]) for name, value in body.state_dict().items())
    assert aligndet.backbone(tmp_path / "mine.pt").name == "resnet18"
    (tmp_path / "config.json").write_text(json.dumps({"backbone": {"name": "resnet50"}}))  # as beside pretrain-image's
    with pytest.raises(aligndet.WeightsError, match="do not fit resnet50"):
        aligndet.backbone(tmp_path / "mine.pt")
    with pytest.raises(aligndet.WeightsError, match="do not fit resnet50"):
        aligndet.backbone(tmp_path / "mine.pt", "resnet50")
    with pytest.raises(aligndet.ConfigError, match="name"):
        aligndet.backbone(tmp_path / "mine.pt", "resnet99")


def test_who_takes_the_inner_parts_is_told_of_the_api(chain: Path) -> None:
    run = chain / "pretrain-box" / "retinanet-resnet18"
    with pytest.raises(aligndet.WeightsError, match=r"in Python aligndet_cli\.load\("):
        load_detector(run / "weights.pt")
    family = aligndet.load(run, num_classes=3).model
    for call in (family.detect, lambda images: family(images, [])):
        with pytest.raises(TypeError, match=r"takes an ImageBatch, not a list; aligndet_cli\.load gives"):
            call([torch.zeros(3, 64, 64)])  # type: ignore[arg-type]
