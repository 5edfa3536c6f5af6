import argparse
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights, get_model

from aligndet_cli.backbones import BackboneConfig, build_backbone, load_backbone_weights
from aligndet_cli.backbones.resnet import ResNet
from aligndet_cli.backbones.weights import locate_backbone_weights
from aligndet_cli.errors import WeightsError


@pytest.fixture(scope="module")
def state_dict() -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = get_model("resnet18")
    for buffer in model.buffers():
        buffer.add_(1)  # statistics that differ from a fresh network's
    return model.state_dict()


@pytest.fixture
def backbone() -> ResNet:
    torch.manual_seed(2)
    return build_backbone(BackboneConfig(name="resnet18"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's weights cache, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def without(state_dict: dict[str, Tensor], *words: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if not any(word in name for word in words)}


def prefixed(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state_dict.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "torchvision": lambda s: s,
    "torchvision before 0.4.1, without counters": lambda s: without(s, "num_batches_tracked"),
    "plain, without fc": lambda s: without(s, "fc."),
    "MoCo v2": lambda s: {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": {
            **prefixed({k: torch.zeros_like(v) for k, v in s.items()}, "module.encoder_k."),
            **prefixed(s, "module.encoder_q."),
            "module.queue": torch.zeros(4),
        },
    },
    "SwAV": lambda s: {**prefixed(without(s, "fc."), "module."), "module.projection_head.0.weight": torch.zeros(2, 2)},
    "PixPro": lambda s: {"opt": argparse.Namespace(lr=1.0), "model": prefixed(s, "module.encoder.")},
    "DenseCL": lambda s: {"meta": {"epoch": 1}, "state_dict": prefixed(without(s, "fc."), "backbone.")},
    "encoder_q": lambda s: {"state_dict": prefixed(s, "encoder_q.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_fill_every_tensor(
    layout: str, state_dict: dict[str, Tensor], backbone: ResNet, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](state_dict), file)
    load_backbone_weights(backbone, file)
    for name, tensor in backbone.state_dict().items():
        if "num_batches_tracked" not in name or "counters" not in layout:
            assert torch.equal(tensor, state_dict[name]), name


def test_none_leaves_the_backbone_as_it_is(backbone: ResNet) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    load_backbone_weights(backbone, None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


class NotATensor:
    """Something that a checkpoint must not be able to bring to life."""


def write_truncated(file: Path, state_dict: dict[str, Tensor]) -> None:
    torch.save(state_dict, file)
    file.write_bytes(file.read_bytes()[:100_000])


BROKEN: dict[str, tuple[Callable[[Path, dict[str, Tensor]], object], str]] = {
    "truncated": (write_truncated, "not a readable PyTorch file"),
    "empty": (lambda f, s: f.write_bytes(b""), "not a readable PyTorch file"),
    "text": (lambda f, s: f.write_text("<html>404 not found</html>"), "not a readable PyTorch file"),
    "pickle": (lambda f, s: f.write_bytes(pickle.dumps({"a": NotATensor()})), "not a readable PyTorch file"),
    "whole module": (lambda f, s: torch.save(torch.nn.Linear(1, 1), f), "not a readable PyTorch file"),
    "a list": (lambda f, s: torch.save([1, 2], f), "no tensors in it"),
    "another network": (lambda f, s: torch.save({"stem.weight": torch.zeros(1)}, f), "first key: 'stem.weight'"),
    "a key missing": (lambda f, s: torch.save(without(s, "layer3.0.bn2.bias"), f), "missing: layer3.0.bn2.bias;"),
    "many missing": (
        lambda f, s: torch.save(without(s, "layer4"), f),
        "25 tensors missing: layer4.0.conv1.weight",
    ),
    "another shape": (
        lambda f, s: torch.save({**s, "conv1.weight": torch.zeros(64, 3, 3, 3)}, f),
        "of another shape: conv1.weight (64, 3, 3, 3) instead of (64, 3, 7, 7)",
    ),
    "a deeper network": (
        lambda f, s: torch.save({**s, **prefixed(without(s, "layer", "fc", "bn1"), "layer3.2.")}, f),
        "too many: layer3.2.conv1.weight",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_files_are_one_line_and_change_nothing(
    kind: str, state_dict: dict[str, Tensor], backbone: ResNet, tmp_path: Path
) -> None:
    write, message = BROKEN[kind]
    file = tmp_path / "weights.pth"
    write(file, state_dict)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(WeightsError) as raised:
        load_backbone_weights(backbone, file)
    assert message in str(raised.value) and str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_missing_file() -> None:
    with pytest.raises(WeightsError, match="/nowhere/weights.pth: no such file"):
        locate_backbone_weights("/nowhere/weights.pth", "resnet18", offline=True)


@pytest.mark.parametrize("weights", ["ResNet18_Weights.IMAGENET1K_V1", "IMAGENET1K_V1", "DEFAULT"])
def test_names_are_found_in_the_cache(
    weights: str, state_dict: dict[str, Tensor], backbone: ResNet, cache: Path
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
        ("IMAGENET1K_V9", "known: none, workspace, DEFAULT, IMAGENET1K_V1"),
        ("ResNet50_Weights.IMAGENET1K_V1", "not for resnet18, which has: IMAGENET1K_V1"),
        ("ResNet18_Weights.NOPE", "neither a file nor weights of resnet18"),
        ("NoSuchWeights.DEFAULT", "neither a file nor weights of resnet18"),
    ],
)
def test_unknown_names(weights: str, message: str) -> None:
    with pytest.raises(WeightsError) as raised:
        locate_backbone_weights(weights, "resnet18", offline=True)
    assert message in str(raised.value)
