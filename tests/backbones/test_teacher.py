"""Networks to learn from: what a file holds, and everything that can be wrong with a name."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.models import efficientnet_b0, mobilenet_v2, resnet18, resnet34, swin_t

from aligndet_cli.backbones.teacher import find_teacher
from aligndet_cli.backbones.weights import network_of
from aligndet_cli.errors import AlignDetError
from aligndet_cli.files import hash_files
from aligndet_cli.workspace import Workspace

NETWORKS = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "mobilenet_v2": mobilenet_v2,
    "swin_t": swin_t,
    "efficientnet_b0": efficientnet_b0,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tensors_tell_the_network(name: str, tmp_path: Path) -> None:
    torch.save(NETWORKS[name]().state_dict(), tmp_path / "x.pth")
    assert network_of(tmp_path / "x.pth") == name
    (tmp_path / "config.json").write_text(json.dumps({"backbone": {"name": "timm:resnet18"}}))
    assert network_of(tmp_path / "x.pth") == "timm:resnet18"  # the settings of a run of ours, beside it
    for other in ({"backbone": "resnet50"}, ["backbone"], {}):  # another program's
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert network_of(tmp_path / "x.pth") == name


def test_a_teacher_is_frozen_and_has_its_weights(tmp_path: Path) -> None:
    state = resnet18().state_dict()
    torch.save(state, tmp_path / "x.pth")
    teacher = find_teacher(str(tmp_path / "x.pth"), Workspace(tmp_path / "w"), offline=True)
    assert teacher.name == "resnet18" and teacher.weights.content_hash == hash_files([tmp_path / "x.pth"])
    network = teacher.build()
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(network.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_a_file_of_timm_is_what_the_config_beside_it_says(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224").state_dict()
    torch.save(vit, tmp_path / "x.pth")
    # As on the Hub, and as the message about a missing one has it.
    for config in (
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}},
        {"architecture": "vit_tiny_patch16_224"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        teacher = find_teacher(str(tmp_path / "x.pth"), Workspace(tmp_path / "w"), offline=True)
        assert teacher.name == "timm:vit_tiny_patch16_224"
    assert torch.equal(teacher.build().state_dict()["body.cls_token"], vit["cls_token"])


def test_the_tensors_win_but_where_variants_share_them(tmp_path: Path) -> None:
    torch.save(resnet18().state_dict(), tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "Classifier"}))  # another program's
    assert network_of(tmp_path / "x.pth") == "resnet18"
    for architecture, name in (("resnet18", "resnet18"), ("resnetblur18", "timm:resnetblur18")):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": {}}))
        assert network_of(tmp_path / "x.pth") == name


def write_bad_files(folder: Path) -> None:
    folder.joinpath("folder.pth").mkdir()
    folder.joinpath("text.pth").write_text("no weights")
    torch.save({"mine.weight": torch.zeros(3)}, folder / "unknown.pth")
    torch.save(
        {key: value for key, value in resnet18().state_dict().items() if "layer4" not in key}, folder / "cut.pth"
    )


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("none", "neither a file nor timm:NAME"),
        ("DEFAULT", "neither a file nor timm:NAME"),
        ("missing.pth", "no such file"),
        ("folder.pth", "is a folder"),
        ("text.pth", "not a readable PyTorch file"),
        (
            "unknown.pth",
            "no backbone in a layout that tells its network; if it is one of timm, name it in a config.json beside the "
            'file: {"architecture": "vit_small_patch14_dinov2"}',
        ),
        ("cut.pth", "hold a resnet that is none of resnet18, resnet34, resnet50, resnet101; if it is one of timm, "),
    ],
)
def test_mistakes_are_told_of_the_teacher(
    teacher: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlignDetError) as caught:
        find_teacher(teacher, Workspace(tmp_path / "w"), offline=True)
    text = str(caught.value)
    assert text.startswith(f"--teacher {teacher}: {said}") and "\n" not in text


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("timm:resnot18", "timm has no such network; did you mean"),
        ("timm:resnet18.no_such_tag", "timm has no weights 'no_such_tag' of resnet18"),
        ("timm:mixer_b16_224", "cannot serve, "),
        (
            "timm:resnet18.a1_in1k",
            "hub:timm/resnet18.a1_in1k: model.safetensors is not in the cache of the Hub, and no",
        ),
    ],
)
def test_mistakes_with_names_of_timm(teacher: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(AlignDetError) as caught:
        find_teacher(teacher, Workspace(tmp_path), offline=True)
    assert str(caught.value).startswith(f"--teacher {teacher}: {said}")
