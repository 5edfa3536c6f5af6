"""MobileNet v2 and Swin behind the interface that `test_resnet.py` checks on ResNets."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import pad
from torchvision.models import get_model
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import StochasticDepth

from aligndet_cli.backbones import FAMILIES, Backbone, BackboneConfig, build_backbone
from aligndet_cli.backbones.swin import Swin

# mmdetection's `out_indices=(1, 2, 4, 7)`, and the widths of Swin's paper: C, 2C, 4C, 8C
CHANNELS = {
    "mobilenet_v2": (24, 32, 96, 1280),
    "swin_t": (96, 192, 384, 768),
    "swin_s": (96, 192, 384, 768),
    "swin_b": (128, 256, 512, 1024),
    "swin_l": (192, 384, 768, 1536),
}
ADDED = ("norm0.", "norm1.", "norm2.")


def tiny_swin(drop_path: float = 0.0) -> Swin:
    torch.manual_seed(0)
    body = SwinTransformer([4, 4], 16, [1, 2, 1, 1], [1, 2, 4, 8], [7, 7], stochastic_depth_prob=drop_path)
    return Swin(body, "swin_tiny")


def build(name: str) -> Backbone:
    torch.manual_seed(0)
    return tiny_swin() if name == "swin" else build_backbone(BackboneConfig(name=name))


@pytest.mark.parametrize("name", sorted(CHANNELS.keys() - {"swin_l"}))
def test_keys_are_torchvisions_without_the_classifier(name: str) -> None:
    with torch.device("meta"):
        backbone, reference = build_backbone(BackboneConfig(name=name)), get_model(name)
    classifier = f"{backbone.classifier}."
    expected = {key: tensor.shape for key, tensor in reference.state_dict().items() if not key.startswith(classifier)}
    assert {key: tensor.shape for key, tensor in backbone.torchvision_state().items()} == expected
    assert classifier + "weight" in reference.state_dict()
    added = backbone.state_dict().keys() - backbone.torchvision_state().keys()
    assert {key.split(".")[0] + "." for key in added} == (set(ADDED) if name.startswith("swin") else set())


def test_swin_l_has_the_published_size() -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name="swin_l"))
    body = sum(p.numel() for name, p in backbone.named_parameters() if not name.startswith(ADDED))
    # timm's swin_large_patch4_window7_224 has 196,532,476 parameters, 1,000 * (1,536 + 1) of them in its classifier
    assert body + 1000 * 1537 == 196_532_476


@pytest.mark.parametrize("name", CHANNELS)
def test_maps_of_odd_sizes_are_rounded_up(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name=name))
        maps = backbone(torch.zeros(2, 3, 61, 83))
    assert tuple(backbone.channels.values()) == CHANNELS[name]
    # 61 / (4, 8, 16, 32) = 15.25, 7.6, 3.8, 1.9 and 83 / ... = 20.75, 10.4, 5.2, 2.6, rounded up
    sizes = ((16, 21), (8, 11), (4, 6), (2, 3))
    assert {level: tuple(tensor.shape) for level, tensor in maps.items()} == {
        level: (2, width, *size) for (level, width), size in zip(backbone.channels.items(), sizes, strict=True)
    }


def test_mobilenet_output_is_torchvisions() -> None:
    torch.manual_seed(0)
    reference = get_model("mobilenet_v2").eval()
    backbone = build("mobilenet_v2").eval()
    backbone.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("classifier.")})
    pixels = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(reference.classifier(backbone(pixels)["c5"].mean(dim=(2, 3))), reference(pixels))


def test_swin_output_is_torchvisions() -> None:
    torch.manual_seed(0)
    body = SwinTransformer([4, 4], 16, [1, 2, 1, 1], [1, 2, 4, 8], [7, 7], num_classes=5).eval()
    backbone, pixels = Swin(body, "swin_tiny").eval(), torch.randn(1, 3, 64, 96)
    maps = backbone(pixels)
    torch.testing.assert_close(body.head(maps["c5"].mean(dim=(2, 3))), body(pixels))
    # The other levels are the inputs of the patch mergings, each under its own fresh norm.
    for level, end in (("c2", 2), ("c3", 4), ("c4", 6)):
        expected = nn.functional.layer_norm(body.features[:end](pixels), (backbone.channels[level],))
        torch.testing.assert_close(maps[level], expected.permute(0, 3, 1, 2))


def test_swin_pads_the_image_with_zeros_at_the_bottom_and_the_right() -> None:
    backbone, pixels = tiny_swin().eval(), torch.randn(1, 3, 61, 83)
    for one, other in zip(backbone(pixels).values(), backbone(pad(pixels, (0, 1, 0, 3))).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["mobilenet_v2", "swin"])
def test_channels_last_and_copies_change_nothing(name: str) -> None:
    backbone, pixels = build(name).eval(), torch.randn(2, 3, 64, 48)
    other = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    maps = other(pixels.contiguous(memory_format=torch.channels_last))
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in maps.values())
    torch.testing.assert_close(maps, backbone(pixels), rtol=1e-4, atol=1e-5)


# mmdetection counts a patch merging and a stage's norm to the stage before; MobileNet v2's blocks end at c2..c5.
MOBILENET_STAGES = (range(1, 4), range(4, 7), range(7, 14), range(14, 19))
FROZEN = {
    ("mobilenet_v2", -1): (),
    ("mobilenet_v2", 0): ("features.0.",),
    ("mobilenet_v2", 2): tuple(f"features.{i}." for i in (0, *MOBILENET_STAGES[0], *MOBILENET_STAGES[1])),
    ("mobilenet_v2", 4): ("features.",),
    ("swin", -1): (),
    ("swin", 0): ("features.0.",),
    ("swin", 1): ("features.0.", "features.1.", "features.2.", "norm0."),
    ("swin", 4): ("features.", "norm"),
}


@pytest.mark.parametrize(("name", "frozen_stages"), FROZEN)
def test_frozen_stages_have_no_gradients_and_stay_in_eval_mode(name: str, frozen_stages: int) -> None:
    backbone = build(name)
    backbone.freeze(frozen_stages, norm_eval=False)
    prefixes = FROZEN[name, frozen_stages]
    for parameter_name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != parameter_name.startswith(prefixes), parameter_name
    for module_name, module in backbone.train().named_modules():
        if isinstance(module, nn.BatchNorm2d | StochasticDepth):
            assert module.training != f"{module_name}.".startswith(prefixes), module_name


def test_norm_eval_is_for_batch_norm_alone() -> None:
    for name, kind in (("mobilenet_v2", nn.BatchNorm2d), ("swin", nn.LayerNorm)):
        backbone = build(name)
        backbone.freeze(-1, norm_eval=True)
        norms = [module for module in backbone.train().modules() if isinstance(module, kind)]
        assert norms and all(norm.training == (name == "swin") for norm in norms)
        assert all(norm.weight.requires_grad for norm in norms)


def test_drop_path_grows_to_the_last_block_and_is_off_in_eval() -> None:
    with torch.device("meta"):
        swin = build_backbone(BackboneConfig(name="swin_t"))
    chances = [module.p for module in swin.modules() if isinstance(module, StochasticDepth)]
    # twelve blocks: 0.2 * block / 11
    assert chances == pytest.approx([0.2 * block / 11 for block in range(12)])
    swin = tiny_swin(drop_path=0.9)
    pixels = torch.randn(8, 3, 32, 32)
    first, second = swin.train()(pixels)["c5"], swin(pixels)["c5"]
    assert not torch.equal(first, second)
    assert torch.equal(swin.eval()(pixels)["c5"], swin(pixels)["c5"])


def test_norms_of_levels_that_nobody_uses_are_not_trained() -> None:
    backbone = tiny_swin()
    assert backbone.use_levels(("c3", "c5")) == {"c3": 32, "c5": 128}
    backbone.freeze(1, norm_eval=False)  # whatever comes later
    maps = backbone(torch.randn(1, 3, 32, 32))
    (maps["c3"].sum() + maps["c5"].sum()).backward()
    idle = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
    assert idle == {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert {"norm0.weight", "norm2.bias"} <= idle and not {"norm1.weight", "norm.bias"} & idle


def test_settings_of_a_family_are_checked() -> None:
    assert {name: BackboneConfig(name=name).family for name in FAMILIES} == FAMILIES
    assert BackboneConfig(name="swin_t", drop_path=0.3).drop_path == 0.3
    with pytest.raises(ValidationError, match="only Swin has it, not resnet50"):
        BackboneConfig(drop_path=0.1)
