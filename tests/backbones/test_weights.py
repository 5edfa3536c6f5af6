import argparse
import copy
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, get_model

from aligndet_cli.backbones import (
    Backbone,
    BackboneConfig,
    build_backbone,
    find_backbone_weights,
    load_backbone_weights,
)
from aligndet_cli.backbones.layouts import recognise
from aligndet_cli.backbones.weights import fill_backbone, locate_backbone_weights
from aligndet_cli.errors import WeightsError
from aligndet_cli.workspace import Workspace


@pytest.fixture(scope="module")
def state_dict() -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = get_model("resnet18")
    for buffer in model.buffers():
        buffer.add_(1)  # statistics that differ from a fresh network's
    return model.state_dict()


@pytest.fixture(scope="module")
def fresh() -> Backbone:
    torch.manual_seed(2)
    return build_backbone(BackboneConfig(name="resnet18"))


@pytest.fixture
def backbone(fresh: Backbone) -> Backbone:
    return copy.deepcopy(fresh)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's weights cache, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def without(state_dict: dict[str, Tensor], *words: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if not any(word in name for word in words)}


def prefixed(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state_dict.items()}


def numbered(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as children of `nn.Sequential(*resnet.children())`: conv1, bn1, relu, maxpool, layer1..4."""
    children = [name for name, _ in get_model("resnet18").named_children()]
    parts = [(name.partition("."), value) for name, value in without(state_dict, "fc.").items()]
    return {f"{children.index(child)}.{rest}": value for (child, _, rest), value in parts}


def zeros(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the other network of a momentum method, which must not be taken."""
    return prefixed({name: torch.zeros_like(tensor) for name, tensor in state_dict.items()}, prefix)


ONE = torch.zeros(1)
OPTIONS = argparse.Namespace(lr=1.0)
# Per file: the layout that is reported, and what the file holds; names from the released code of each method.
LAYOUTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict]]] = {
    "torchvision, timm, DetCo": ("torchvision", lambda s: s),
    "before PyTorch 0.4.1, without counters": ("torchvision", lambda s: without(s, "num_batches_tracked")),
    "without fc, as DINO's backbone": ("torchvision", lambda s: without(s, "fc.")),
    "MoCo v2": (
        "MoCo",
        lambda s: {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": {**zeros(s, "module.encoder_k."), **prefixed(s, "module.encoder_q."), "module.queue": ONE},
        },
    ),
    "MoCo, without module": ("MoCo", lambda s: {"state_dict": prefixed(s, "encoder_q.")}),
    "SwAV": ("SwAV", lambda s: {**prefixed(without(s, "fc."), "module."), "module.projection_head.0.weight": ONE}),
    "SwAV, whole": (
        "SwAV",
        lambda s: {"args": OPTIONS, "state_dict": {**prefixed(s, "module."), "module.prototypes.weight": ONE}},
    ),
    "PixPro": (
        "PixPro",
        lambda s: {
            "opt": OPTIONS,
            "model": {
                **prefixed(s, "module.encoder."),
                **zeros(s, "module.encoder_k."),
                "module.value_transform.weight": ONE,
                "module.predictor.linear1.weight": ONE,
            },
        },
    ),
    "PixPro, published": ("PixPro, SoCo or like them", lambda s: {"model": prefixed(s, "module.encoder.")}),
    "SoCo": (
        "SoCo",
        lambda s: {
            "opt": OPTIONS,
            "model": {
                **prefixed(s, "module.encoder."),
                **zeros(s, "module.encoder_k."),
                "module.predictor.linear1.weight": ONE,
            },
            "model_ema": zeros(s, "encoder."),
        },
    ),
    "SimSiam": (
        "SimSiam",
        lambda s: {
            "state_dict": {**prefixed(without(s, "fc."), "module.encoder."), "module.predictor.0.weight": ONE},
            "arch": "resnet18",
        },
    ),
    "DenseCL": (
        "DenseCL",
        lambda s: {
            "meta": {"epoch": 1},
            "state_dict": {
                **prefixed(without(s, "fc."), "backbone."),
                **prefixed(without(s, "fc."), "encoder_q.0."),
                **zeros(s, "encoder_k.0."),
            },
        },
    ),
    "OpenSelfSup": ("torchvision", lambda s: {"state_dict": prefixed(without(s, "fc."), "backbone.")}),
    "BYOL-PyTorch": (
        "BYOL",
        lambda s: {
            "online_backbone": prefixed(numbered(s), "module.encoder."),
            "target_backbone": zeros(numbered(s), "module.encoder."),
        },
    ),
    "byol-pytorch": ("BYOL", lambda s: {**prefixed(s, "online_encoder.net."), **zeros(s, "target_encoder.net.")}),
    "BYOL, encoder": ("BYOL", lambda s: {"state_dict": prefixed(s, "online_encoder.encoder.")}),
    "BYOL, network": (
        "BYOL",
        lambda s: {"state_dict": {**prefixed(s, "module.online_network."), **zeros(s, "module.target_network.")}},
    ),
    "DINO, whole": (
        "DINO",
        lambda s: {
            "student": zeros(s, "module.backbone."),
            "teacher": {**prefixed(without(s, "fc."), "backbone."), "head.mlp.0.weight": ONE},
            "args": OPTIONS,
            "epoch": 100,
        },
    ),
    "SlotCon": (
        "SlotCon",
        lambda s: {
            "args": OPTIONS,
            "model": {
                **zeros(s, "module.encoder_q."),
                **prefixed(without(s, "fc."), "module.encoder_k."),
                "module.grouping_q.slot_embed.weight": ONE,
            },
        },
    ),
    "lightly": ("lightly", lambda s: {"state_dict": {**prefixed(numbered(s), "backbone."), "projection_head.x": ONE}}),
    "lightly, named": ("torchvision", lambda s: {"state_dict": prefixed(without(s, "fc."), "backbone.")}),
    "mmdetection": (
        "mmdetection",
        lambda s: {
            "meta": {"CLASSES": ("a", "b")},
            "state_dict": {**prefixed(without(s, "fc."), "backbone."), "bbox_head.retina_cls.weight": ONE},
        },
    ),
    "AlignDet's": (
        "AlignDet's own",
        lambda s: {
            "state_dict": {
                **prefixed(without(s, "fc."), "backbone.backbone."),
                **zeros(s, "target_backbone.backbone."),
            }
        },
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_published_layouts_fill_every_tensor(kind: str, state_dict: dict[str, Tensor], backbone: Backbone) -> None:
    layout, wrap = LAYOUTS[kind]
    found = recognise(wrap(state_dict))
    assert found is not None and (found.layout, found.family) == (layout, "resnet")
    fill_backbone(backbone, found, Path("file.pth"))
    # The very same tensors, so the very same features.
    for name, tensor in backbone.state_dict().items():
        if "num_batches_tracked" not in name or "counters" not in kind:
            assert torch.equal(tensor, state_dict[name]), name


def config_of(file: Path, name: str) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name, "weights": str(file)})


@pytest.mark.parametrize("kind", ["torchvision, timm, DetCo", "SlotCon"])
def test_files_fill_every_tensor(
    kind: str, state_dict: dict[str, Tensor], backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout, wrap = LAYOUTS[kind]
    file = tmp_path / "weights.pth"
    torch.save(wrap(state_dict), file)
    weights = find_backbone_weights(config_of(file, "resnet18"), Workspace(tmp_path / "w"), offline=True)
    assert weights.file == file and weights.origin == f"{file} ({layout} layout)"
    with caplog.at_level("INFO", logger="aligndet"):
        load_backbone_weights(backbone, weights.file)
    # 20 convolutions and 20 batch norms of four tensors
    assert f"{layout} layout, all 100 tensors of the resnet18 found" in caplog.text
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in backbone.state_dict().items())


def mmdetection_mobilenet(backbone: Backbone) -> dict[str, Tensor]:
    """mmdetection's names, from the modules: layers are the runs of blocks of one width."""
    names = {"features.0.0": "conv1.conv", "features.0.1": "conv1.bn"}
    names |= {"features.18.0": "conv2.conv", "features.18.1": "conv2.bn"}
    widths = [16, 24, 32, 64, 96, 160, 320]
    counts: dict[int, int] = {}
    for index in range(1, 18):
        block = backbone.features[index]
        layer = widths.index(block.out_channels) + 1
        at = f"layer{layer}.{counts.get(layer, 0)}"
        counts[layer] = counts.get(layer, 0) + 1
        leaves = [name for name, module in block.named_modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
        parts = ("expand_conv", "depthwise_conv", "linear_conv")[-len(leaves) // 2 :]
        targets = [f"{at}.{part}.{kind}" for part in parts for kind in ("conv", "bn")]
        names |= {f"features.{index}.{leaf}": target for leaf, target in zip(leaves, targets, strict=True)}
    return {
        f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
        for name, tensor in backbone.state_dict().items()
    }


@pytest.mark.parametrize("layout", ["torchvision", "mmdetection"])
def test_mobilenet_layouts_fill_every_tensor(layout: str) -> None:
    source, backbone = (build_backbone(BackboneConfig(name="mobilenet_v2")) for _ in range(2))
    tensors = mmdetection_mobilenet(source) if layout == "mmdetection" else source.state_dict()
    found = recognise({"state_dict": {**tensors, "classifier.1.bias": ONE}})
    assert found is not None and (found.layout, found.family, found.num_others) == (layout, "mobilenet", 1)
    fill_backbone(backbone, found, Path("file.pth"))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in backbone.state_dict().items())


def test_none_leaves_the_backbone_as_it_is(backbone: Backbone) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    load_backbone_weights(backbone, None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


class NotATensor:
    """A class that a checkpoint must not be able to create."""


class Bomb:
    """Write a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("bomb-went-off",)


def write_truncated(file: Path, state_dict: dict[str, Tensor]) -> None:
    torch.save(state_dict, file)
    file.write_bytes(file.read_bytes()[:100_000])


BROKEN: dict[str, tuple[Callable[[Path, dict[str, Tensor]], object], str]] = {
    "truncated": (write_truncated, "not a readable PyTorch file"),
    "empty": (lambda f, s: f.write_bytes(b""), "not a readable PyTorch file"),
    "text": (lambda f, s: f.write_text("<html>404 not found</html>"), "not a readable PyTorch file"),
    "pickle": (lambda f, s: f.write_bytes(pickle.dumps({"a": NotATensor()})), "not a readable PyTorch file"),
    "bomb": (lambda f, s: torch.save({"state_dict": s, "meta": Bomb()}, f), "not a readable PyTorch file"),
    "bomb of old": (lambda f, s: f.write_bytes(pickle.dumps(Bomb())), "not a readable PyTorch file"),
    "whole module": (lambda f, s: torch.save(torch.nn.Linear(1, 1), f), "not a readable PyTorch file"),
    "a list": (lambda f, s: torch.save([1, 2], f), "no tensors in it"),
    "another network": (lambda f, s: torch.save({"stem.weight": torch.zeros(1)}, f), "first key: 'stem.weight'"),
    "a key missing": (lambda f, s: torch.save(without(s, "layer3.0.bn2.bias"), f), "missing: layer3.0.bn2.bias;"),
    "many missing": (
        lambda f, s: torch.save(without(s, "layer4"), f),
        "25 of 100 tensors missing: layer4.0.conv1.weight",
    ),
    "another shape": (
        lambda f, s: torch.save({**s, "conv1.weight": torch.zeros(64, 3, 3, 3)}, f),
        "of another shape: conv1.weight (64, 3, 3, 3) instead of (64, 3, 7, 7)",
    ),
    "another family": (
        lambda f, s: torch.save({"features.1.conv.0.0.weight": torch.zeros(1)}, f),
        "hold a mobilenet (torchvision layout), not a resnet18",
    ),
    "a deeper network": (
        lambda f, s: torch.save({**s, **prefixed(without(s, "layer", "fc", "bn1"), "layer3.2.")}, f),
        "too many: layer3.2.conv1.weight",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_files_are_one_line_and_change_nothing(
    kind: str, state_dict: dict[str, Tensor], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write, message = BROKEN[kind]
    file = tmp_path / "weights.pth"
    write(file, state_dict)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(WeightsError) as raised:
        load_backbone_weights(backbone, file)
    assert not Path("bomb-went-off").exists()
    assert message in str(raised.value) and str(file) in str(raised.value) and raised.value.exit_code == 4
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_a_file_that_does_not_fit_is_refused_before_the_run(state_dict: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(state_dict, file)
    with pytest.raises(
        WeightsError, match=r"weights\.pth: do not fit resnet34 \(torchvision layout\): 80 of 180 tensors"
    ):
        find_backbone_weights(config_of(file, "resnet34"), Workspace(tmp_path / "w"), offline=True)


def test_swin_l_is_not_torchvisions() -> None:
    with pytest.raises(WeightsError, match="known: none, workspace, or the path of a weights file"):
        locate_backbone_weights("DEFAULT", "swin_l", offline=True)
    with pytest.raises(WeightsError, match="not for swin_l, for which torchvision has none"):
        locate_backbone_weights("Swin_B_Weights.DEFAULT", "swin_l", offline=True)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(WeightsError, match="/nowhere/weights.pth: no such file"):
        locate_backbone_weights("/nowhere/weights.pth", "resnet18", offline=True)


@pytest.mark.parametrize("weights", ["ResNet18_Weights.IMAGENET1K_V1", "IMAGENET1K_V1", "DEFAULT"])
def test_names_are_found_in_the_cache(
    weights: str, state_dict: dict[str, Tensor], backbone: Backbone, cache: Path
) -> None:
    cache.mkdir(parents=True)
    torch.save(state_dict, cache / Path(ResNet18_Weights.IMAGENET1K_V1.url).name)
    load_backbone_weights(backbone, locate_backbone_weights(weights, "resnet18", offline=True))
    assert torch.equal(backbone.conv1.weight, state_dict["conv1.weight"])


def test_offline_says_where_to_put_the_file(cache: Path) -> None:
    name = Path(ResNet18_Weights.DEFAULT.url).name
    with pytest.raises(WeightsError) as raised:
        locate_backbone_weights("DEFAULT", "resnet18", offline=True)
    assert f"put {name} at {cache / name}" in str(raised.value)


def test_a_failed_download_says_where_to_put_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror("name not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(WeightsError, match=r"download failed \(name not known\); put resnet18-.*\.pth at "):
        locate_backbone_weights("DEFAULT", "resnet18", offline=False)


def test_a_download_is_checked_against_the_hash_in_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: calls.append((args, kwargs)))
    file = locate_backbone_weights("IMAGENET1K_V1", "resnet18", offline=False)
    url = ResNet18_Weights.IMAGENET1K_V1.url
    assert calls == [((url, str(file)), {"hash_prefix": url.rsplit("-")[-1].split(".")[0], "progress": False})]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("IMAGENET1K_V9", "known: none, workspace, IMAGENET1K_V1, DEFAULT, or"),
        ("ResNet50_Weights.IMAGENET1K_V1", "not for resnet18, which has: IMAGENET1K_V1"),
        ("ResNet18_Weights.NOPE", "neither a file nor weights of resnet18"),
        ("NoSuchWeights.DEFAULT", "neither a file nor weights of resnet18"),
    ],
)
def test_unknown_names_are_refused(weights: str, message: str) -> None:
    with pytest.raises(WeightsError) as raised:
        locate_backbone_weights(weights, "resnet18", offline=True)
    assert message in str(raised.value)
