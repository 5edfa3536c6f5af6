"""Backbones of timm by name: features, levels, freezing, weights in several layouts, and through the commands."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.models import mobilenet_v2, resnet18

from aligndet_cli.backbones import (
    Backbone,
    BackboneConfig,
    WeightsTraining,
    build_backbone,
    find_backbone_weights,
    load_backbone_weights,
    timm_weights,
    training_shown_by,
)
from aligndet_cli.backbones.from_timm import create_whole, facts_of
from aligndet_cli.backbones.interface import STRIDES
from aligndet_cli.backbones.timm_weights import read_timm
from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.data.transforms import MEAN, STD
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.detectors.recipes import recipe_for
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.workspace import Workspace
from helpers.commandline import CHAIN, NECK, RESOLUTION, aligndet
from helpers.small_detectors import SMALL

timm = pytest.importorskip("timm")

# Widths of the last maps at strides 4, 8, 16 and 32, as timm says.
WIDTHS = {
    "resnet18": (64, 128, 256, 512),
    "resnet50.tv_in1k": (256, 512, 1024, 2048),
    "resnext50_32x4d": (256, 512, 1024, 2048),
    "seresnet50": (256, 512, 1024, 2048),
    "convnext_atto": (40, 80, 160, 320),
    "convnext_nano": (80, 160, 320, 640),
    "convnext_tiny.dinov3_lvd1689m": (96, 192, 384, 768),
    "convnextv2_atto": (40, 80, 160, 320),
    "convnextv2_tiny": (96, 192, 384, 768),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),
    "swinv2_tiny_window8_256": (96, 192, 384, 768),
    "hgnet_tiny": (224, 448, 512, 768),
    "hgnetv2_b0": (64, 256, 512, 1024),
    "mobilenetv3_large_100": (24, 40, 112, 960),
    "mobilenetv3_small_100": (16, 24, 48, 576),
    "mobilenetv2_100": (24, 32, 96, 320),
    "mobilenetv4_conv_small": (32, 64, 96, 960),
    "efficientnet_b0": (24, 40, 112, 320),
    "efficientnet_lite0": (24, 40, 112, 320),
    "tf_efficientnet_lite0": (24, 40, 112, 320),
    "tf_efficientnet_b0": (24, 40, 112, 320),
    "efficientnetv2_rw_t": (40, 48, 128, 208),
    "tf_efficientnetv2_b0": (32, 48, 112, 192),
    "mnasnet_100": (24, 40, 96, 320),
    "fbnetc_100": (24, 32, 112, 352),
    "regnetx_002": (24, 56, 152, 368),
    "regnety_002": (24, 56, 152, 368),
    "regnetz_b16": (48, 96, 192, 1536),
    "densenet121": (256, 512, 1024, 1024),
    "vgg11_bn": (256, 512, 512, 512),
    "dla34": (64, 128, 256, 512),
    "dpn68": (144, 320, 704, 832),
    "res2net50_26w_4s": (256, 512, 1024, 2048),
    "resnest14d": (256, 512, 1024, 2048),
    "skresnet18": (64, 128, 256, 512),
    "ecaresnet26t": (256, 512, 1024, 2048),
    "resnetv2_50": (256, 512, 1024, 2048),
    "nf_regnet_b0": (40, 80, 160, 960),
    "repvgg_a0": (48, 96, 192, 1280),
    "repghostnet_050": (12, 20, 40, 80),
    "ghostnet_050": (12, 20, 40, 80),
    "fastvit_t8": (48, 96, 192, 384),
    "mobileone_s0": (48, 128, 256, 1024),
    "pvt_v2_b0": (32, 64, 160, 256),
    "edgenext_small": (48, 96, 160, 304),
    "davit_tiny": (96, 192, 384, 768),
    "inception_next_atto": (40, 80, 160, 320),
    "caformer_s18": (64, 128, 320, 512),
    "convformer_s18": (64, 128, 320, 512),
    "poolformer_s12": (64, 128, 320, 512),
    "cspdarknet53": (128, 256, 512, 1024),
    "cspresnet50": (128, 256, 512, 1024),
    "vovnet39a": (256, 512, 768, 1024),
    "ese_vovnet19b_dw": (256, 512, 768, 1024),
    "rexnet_100": (38, 61, 128, 185),
    "lcnet_050": (32, 64, 128, 256),
    "tinynet_a": (24, 40, 112, 320),
    "semnasnet_075": (24, 32, 88, 240),
    "hardcorenas_a": (24, 40, 112, 960),
    "mambaout_femto": (48, 96, 192, 288),
    "repvit_m0_9": (48, 96, 192, 384),
    "starnet_s1": (24, 48, 96, 192),
    "nextvit_small": (96, 256, 512, 1024),
    "rdnet_tiny": (256, 440, 744, 1040),
    "focalnet_tiny_srf": (96, 192, 384, 768),
    "tiny_vit_5m_224": (64, 128, 160, 320),
    "efficientvit_b0": (16, 32, 64, 128),
    "xception41": (256, 728, 1024, 2048),
    "gernet_s": (48, 48, 384, 1920),
    "selecsls42": (128, 288, 480, 1024),
    "tresnet_m": (64, 128, 1024, 2048),
    "fasternet_t0": (40, 80, 160, 320),
    "swinv2_cr_tiny_224": (96, 192, 384, 768),
}
# One for each way: pads alike on all sides, as TensorFlow with an input of its own, hooks, whole patches, windows.
SMALLEST = (
    "mobilenetv3_small_100",
    "tf_efficientnet_lite0",
    "xception41",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
)
SIZES_HW = ((61, 83), (96, 65), (33, 50), (64, 127), (101, 32))


def config_of(name: str, **settings: Any) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": f"timm:{name}", **settings})


def build(name: str) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(config_of(name)).eval()


def whole(name: str) -> nn.Module:
    """A network with its classifier, of other weights and statistics than ours."""
    torch.manual_seed(1)
    model: nn.Module = timm.create_model(name)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.5)
    return model


def in_body(state: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """A whole network's tensors by our names."""
    flat = {name.replace(".", "_"): value for name, value in state.items()}
    return {name: flat[name.removeprefix("body.").replace(".", "_")] for name in backbone.torchvision_state()}


# ---- levels ----


def test_the_table_is_long_enough() -> None:
    modules = {type(create_whole(f"timm:{name}")).__module__ for name in list(WIDTHS)[::4]}
    assert len(WIDTHS) >= 60 and len(modules) >= 10  # of every fourth; the whole table has over 30


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDTHS)
def test_levels_are_at_their_strides(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(config_of(name))
        maps = backbone(torch.zeros(2, 3, 61, 83))
    assert tuple(backbone.channels.values()) == WIDTHS[name]
    for (level, one), width in zip(maps.items(), WIDTHS[name], strict=True):
        stride = STRIDES[level]
        assert tuple(one.shape) == (2, width, -(-61 // stride), -(-83 // stride))
    # Stem and stages are the whole body, in order.
    parts = [backbone.stem(), *backbone.stages()]
    assert all(parts) and len(parts) == 5
    named = [id(parameter) for part in parts for module in part for parameter in module.parameters()]
    assert sorted(named) == sorted(id(parameter) for parameter in backbone.parameters())


@pytest.mark.parametrize("name", SMALLEST)
def test_features_are_timms_own(name: str) -> None:
    backbone = build(name)
    torch.manual_seed(0)
    facts = facts_of(f"timm:{name}")
    reference = timm.create_model(name, features_only=True, out_indices=facts.indices, **facts.options).eval()
    reference.load_state_dict({key.removeprefix("body."): value for key, value in backbone.torchvision_state().items()})
    mean, std = (torch.tensor(timm.get_pretrained_cfg(name).to_dict()[kind]).view(3, 1, 1) for kind in ("mean", "std"))
    imagenet_mean, imagenet_std = (torch.tensor(of).view(3, 1, 1) for of in (MEAN, STD))
    for size_hw in SIZES_HW:
        image = torch.rand(1, 3, *size_hw)
        pixels = (image - imagenet_mean) / imagenet_std
        own = backbone.own_input(pixels)
        torch.testing.assert_close(own, (image - mean) / std, rtol=0, atol=2e-6)
        if not facts.rounds_up:
            own = pad(own, (0, -size_hw[1] % 32, 0, -size_hw[0] % 32))
        with torch.inference_mode():
            maps, expected = backbone(pixels), reference(own)
        for (level, one), other in zip(maps.items(), expected, strict=True):
            height, width = (-(-side // STRIDES[level]) for side in size_hw)
            as_channels_first = other.permute(0, 3, 1, 2) if facts.is_channels_last else other
            assert one.shape[-2:] == (height, width)
            torch.testing.assert_close(one, as_channels_first[..., :height, :width], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "mixer_b16_224",
            r"cannot serve, its maps are at strides 16, and detectors need 4, 8, 16 and 32; take one with",
        ),
        ("levit_128s", r"cannot serve, its maps are at strides 16, 32, 64, and .*; take one with four stages, such as"),
        ("maxvit_tiny_tf_224", r"cannot serve, it takes no images of any size \(height \(16\) must .*; take one with"),
        (
            "hrnet_w18_small",
            r"cannot serve, timm names no module of it as the end of a stage \(stage1\); take one with",
        ),
        ("resnet5", r"timm has no such network; did you mean 'resnet50'\?"),
        ("resnet18.a1_in2k", r"timm has no weights 'a1_in2k' of resnet18; did you mean 'a1_in1k'\?"),
    ],
)
def test_what_cannot_serve_is_refused_with_a_way_out(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^--backbone timm:{name}: {said}") as caught:
        build_backbone(config_of(name))
    assert "\n" not in str(caught.value)


def test_stages_that_build_no_recipe_refuse_before_they_start(toy: Path, tmp_path: Path) -> None:
    words = ("pretrain-image", toy, "-w", tmp_path / "w", "--backbone", "timm:mixer_b16_224", "--dry-run")
    assert "cannot serve, its maps are at strides 16" in aligndet(*words, code=2).stderr


def test_without_timm_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    facts_of.cache_clear()
    with pytest.raises(ConfigError, match=r"needs timm: pip install 'aligndet\[timm\]'"):
        build_backbone(config_of("resnet18"))


# ---- freezing and recipes ----


@pytest.mark.parametrize(
    ("name", "frozen_stages", "prefixes"),
    [
        ("resnet18", -1, ()),
        ("resnet18", 1, ("conv1.", "bn1.", "layer1.")),
        ("convnext_atto", 0, ("stem_",)),
        ("mobilenetv3_small_100", 2, ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")),
        ("mobilenetv3_small_100", 4, ("conv_stem.", "bn1.", "blocks.")),
    ],
)
def test_frozen_stages_have_no_gradients_and_stay_in_eval_mode(
    name: str, frozen_stages: int, prefixes: tuple[str, ...]
) -> None:
    backbone = build_backbone(config_of(name, frozen_stages=frozen_stages)).train()
    frozen = tuple(f"body.{prefix}" for prefix in prefixes)
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != parameter_name.startswith(frozen), parameter_name
    for module_name, module in backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training != f"{module_name}.".startswith(frozen), module_name


@pytest.mark.parametrize("family", ["mask-rcnn", "retinanet", "detr"])  # c2..c5, c3..c5 and c5 alone
@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "convnext_atto"])
def test_losses_reach_every_trainable_parameter(name: str, family: str) -> None:
    model = SMALL[family].build(build_backbone(config_of(name)), 3)
    targets = [BoxTargets(torch.tensor([[8.0, 8, 40, 50]]), torch.tensor([1]), torch.tensor([i])) for i in range(2)]
    losses = model(ImageBatch(torch.randn(2, 3, 64, 64), ((61, 64), (64, 50))), targets)
    sum(loss for name, loss in losses.items()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_recipes_are_those_of_the_nearest_family() -> None:
    def recipe(name: str) -> tuple[str, bool]:
        chosen = recipe_for(MaskRCNNConfig(), config_of(name), WeightsTraining("timm"))
        return chosen.name, chosen.freezing is None

    assert recipe("resnet18") == ("self-supervised", True)
    assert recipe("mobilenetv3_small_100") == ("default", False)
    assert recipe("convnext_atto") == ("convnext", False)


# ---- weights ----


def write(tensors: dict[str, Tensor], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    else:
        torch.save({"state_dict": tensors}, file)
    return file


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_100"])
def test_files_of_timm_fill_every_tensor(name: str, suffix: str, tmp_path: Path) -> None:
    state = whole(name).state_dict()
    file = write(state, tmp_path / f"weights{suffix}")
    weights = find_backbone_weights(config_of(name, weights=str(file)), Workspace(tmp_path), offline=True)
    assert weights.training == WeightsTraining("timm", is_supervised=True)
    assert weights.origin == f"{file} (timm layout)"
    backbone = build(name)
    load_backbone_weights(backbone, weights.file)
    for key, value in in_body(state, backbone).items():
        assert torch.equal(backbone.state_dict()[key], value), key


def test_original_names_are_converted_by_timm(tmp_path: Path) -> None:
    state = whole("convnext_atto").state_dict()
    new = {}
    for name, value in state.items():
        for i in (1, 2, 3):
            name = name.replace(f"stages.{i}.downsample.", f"downsample_layers.{i}.")
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".").replace("conv_dw", "dwconv")
        name = name.replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        new[name.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = value
    backbone = build("convnext_atto")
    load_backbone_weights(backbone, write({"model": new}, tmp_path / "convnext.pth"))
    for key, value in in_body(state, backbone).items():
        assert torch.equal(backbone.state_dict()[key].flatten(), value.flatten()), key


def test_torchvisions_resnet_has_timms_names(tmp_path: Path) -> None:
    state = resnet18().state_dict()
    found = read_timm("timm:resnet18", write(state, tmp_path / "resnet.pth"))
    assert found.is_supervised and found.num_others == 2  # the classifier
    assert all(torch.equal(found.tensors[f"body.{key}"], state[key]) for key in state if not key.startswith("fc."))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: whole("resnet34").state_dict(), r"of .* tensors too many: body\.layer1\.2\.conv1\.weight, "),
        (lambda: whole("resnet26").state_dict(), r"of .* tensors of another shape: body\.layer1\.0"),
        (
            lambda: mobilenet_v2().state_dict(),
            r"hold no timm:resnet18 in a layout that timm knows, but one of the family of mobilenet_v2 .*name it",
        ),
        (lambda: {"a": torch.zeros(1)}, r"hold no timm:resnet18 in a layout that timm knows; use another file"),
    ],
    ids=["deeper", "bottlenecks", "another", "none"],
)
def test_other_files_are_refused(make: Any, said: str, tmp_path: Path) -> None:
    file = write(make(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=f"^backbone weights {file}: .*{said}"):
        find_backbone_weights(config_of("resnet18", weights=str(file)), Workspace(tmp_path), offline=True)


def test_nothing_is_downloaded_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(whole("convnext_atto").state_dict(), tmp_path / "model.safetensors")
    asked: list[tuple[str, str, bool]] = []

    def fetch(name: str, *, file: str, offline: bool) -> Path:
        asked.append((name, file, offline))
        return tmp_path / file

    monkeypatch.setattr(timm_weights, "fetch_weights", fetch)
    workspace = Workspace(tmp_path)
    for weights in ("auto", "none", str(file)):
        find_backbone_weights(config_of("convnext_atto", weights=weights), workspace, offline=False)
    assert training_shown_by("timm", "timm:convnext_atto").is_supervised and asked == []
    found = find_backbone_weights(config_of("convnext_atto", weights="timm"), workspace, offline=False)
    assert asked == [("hub:timm/convnext_atto.d2_in1k", "model.safetensors", False)]
    assert found.origin == "timm's, licence: apache-2.0" and found.training.is_supervised
    with pytest.raises(
        WeightsError, match="'DEFAULT': neither a file nor .*; known: none, workspace, timm, or the path"
    ):
        find_backbone_weights(config_of("convnext_atto", weights="DEFAULT"), workspace, offline=False)


def test_offline_the_cache_must_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        WeightsError, match=r"model.safetensors is not in the cache of the Hub, and no download is allow"
    ):
        find_backbone_weights(config_of("convnext_atto", weights="timm"), Workspace(tmp_path), offline=True)


# ---- through the commands ----


def test_the_commands_run(toy: Path, tmp_path: Path) -> None:
    """Run image pre-training, box pre-training on its weights, and fine-tuning, for one step each."""
    name, workspace = "mobilenetv3_small_100", tmp_path / "w"
    aligndet("proposals", toy, "-w", workspace, *CHAIN["proposals"])
    words = ("-w", workspace, "--backbone", f"timm:{name}", "--steps", "1", "--batch-size", "2", "-q")
    aligndet("pretrain-image", toy, *words, "--method", "moco-v2", "--set", "image_size=32")
    detector = ("--detector", "retinanet", *NECK, *RESOLUTION)
    aligndet("pretrain-box", *words, *detector, "--backbone-weights", "workspace")
    ran = aligndet("finetune", *words, *detector, "--json").json()
    assert ran["result"]["init"] == "pretrain" and ran["result"]["matched_share"] == 1
    trained = torch.load(workspace / "finetune" / f"retinanet-timm-{name}" / "weights.pt", weights_only=True)
    assert trained["backbone"]["name"] == f"timm:{name}"
    aligndet("evaluate", "-w", workspace, "-q")
