"""All other families behind the interface that `test_resnet.py` checks on ResNets."""

import copy
import functools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.models import ConvNeXt as TorchvisionConvNeXt
from torchvision.models import get_model
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import StochasticDepth

from aligndet_cli.backbones import FAMILIES, Backbone, BackboneConfig, build_backbone
from aligndet_cli.backbones.convnext import ConvNeXt
from aligndet_cli.backbones.swin import Swin

# mmdetection's `out_indices=(1, 2, 4, 7)`; the widths of the papers of Swin and ConvNeXt: C, 2C, 4C, 8C; EfficientNet's
# tables: the last blocks at strides 4, 8 and 16, and the last convolution.
CHANNELS = {
    "mobilenet_v2": (24, 32, 96, 1280),
    "swin_t": (96, 192, 384, 768),
    "swin_s": (96, 192, 384, 768),
    "swin_b": (128, 256, 512, 1024),
    "swin_l": (192, 384, 768, 1536),
    "convnext_tiny": (96, 192, 384, 768),
    "convnext_small": (96, 192, 384, 768),
    "convnext_base": (128, 256, 512, 1024),
    "convnext_large": (192, 384, 768, 1536),
    "efficientnet_b0": (24, 40, 112, 1280),
    "efficientnet_b1": (24, 40, 112, 1280),
    "efficientnet_b2": (24, 48, 120, 1408),
    "efficientnet_b3": (32, 48, 136, 1536),
    "efficientnet_b4": (32, 56, 160, 1792),
    "efficientnet_b5": (40, 64, 176, 2048),
    "efficientnet_b6": (40, 72, 200, 2304),
    "efficientnet_b7": (48, 80, 224, 2560),
    "efficientnet_v2_s": (48, 64, 160, 1280),
    "efficientnet_v2_m": (48, 80, 176, 1280),
    "efficientnet_v2_l": (64, 96, 224, 1280),
    "efficientnet_lite0": (24, 40, 112, 1280),
    "efficientnet_lite1": (24, 40, 112, 1280),
    "efficientnet_lite2": (24, 48, 120, 1280),
}
NOT_OF_TORCHVISION = {"swin_l", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"}
ADDED = ("norm0.", "norm1.", "norm2.")  # of Swin


def tiny_swin(drop_path: float = 0.0) -> Swin:
    torch.manual_seed(0)
    body = SwinTransformer([4, 4], 16, [1, 2, 1, 1], [1, 2, 4, 8], [7, 7], stochastic_depth_prob=drop_path)
    return Swin(body, "swin_tiny")


def tiny_convnext(drop_path: float = 0.0) -> ConvNeXt:
    torch.manual_seed(0)
    sizes = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 2), CNBlockConfig(64, 128, 1), CNBlockConfig(128, None, 1)]
    return ConvNeXt(TorchvisionConvNeXt(sizes, stochastic_depth_prob=drop_path, layer_scale=1.0), "convnext_small")


def build(name: str) -> Backbone:
    torch.manual_seed(0)
    tiny = {"swin": tiny_swin, "convnext": tiny_convnext}
    return tiny[name]() if name in tiny else build_backbone(BackboneConfig.model_validate({"name": name}))


@functools.cache
def on_meta(name: str) -> Backbone:
    with torch.device("meta"):
        return build_backbone(BackboneConfig.model_validate({"name": name}))


def test_every_name_is_here() -> None:
    assert {name for name, family in FAMILIES.items() if family != "resnet"} == set(CHANNELS)


@pytest.mark.parametrize("name", sorted(CHANNELS.keys() - NOT_OF_TORCHVISION))
def test_keys_are_torchvisions_without_the_classifier(name: str) -> None:
    with torch.device("meta"):
        backbone, reference = on_meta(name), get_model(name)
    # ConvNeXt's classifier has a norm of its own.
    classifier = "classifier." if name.startswith("convnext") else f"{backbone.classifier}."
    expected = {key: tensor.shape for key, tensor in reference.state_dict().items() if not key.startswith(classifier)}
    assert {key: tensor.shape for key, tensor in backbone.torchvision_state().items()} == expected
    assert f"{backbone.classifier}.weight" in reference.state_dict()
    added = backbone.state_dict().keys() - backbone.torchvision_state().keys()
    assert {key.split(".")[0] + "." for key in added} == (
        {"swin": set(ADDED), "convnext": {*ADDED, "norm3."}}.get(backbone.family, set())
    )


# of timm's tf_efficientnet_lite0, 1 and 2
@pytest.mark.parametrize(("size", "parameters"), [(0, 4_652_008), (1, 5_416_680), (2, 6_092_072)])
def test_lite_has_the_published_size(size: int, parameters: int) -> None:
    body = sum(parameter.numel() for parameter in on_meta(f"efficientnet_lite{size}").parameters())
    assert body + 1000 * (1280 + 1) == parameters  # with the classifier


def test_swin_l_has_the_published_size() -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name="swin_l"))
    body = sum(p.numel() for name, p in backbone.named_parameters() if not name.startswith(ADDED))
    # timm's swin_large_patch4_window7_224 has 196,532,476 parameters, 1,000 * (1,536 + 1) of them in its classifier
    assert body + 1000 * 1537 == 196_532_476


@pytest.mark.parametrize("name", CHANNELS)
def test_maps_of_odd_sizes_are_rounded_up(name: str) -> None:
    backbone = on_meta(name)
    maps = backbone(torch.zeros(2, 3, 61, 83, device="meta"))
    assert tuple(backbone.channels.values()) == CHANNELS[name]
    # 61 / (4, 8, 16, 32) = 15.25, 7.6, 3.8, 1.9 and 83 / ... = 20.75, 10.4, 5.2, 2.6, rounded up
    sizes = ((16, 21), (8, 11), (4, 6), (2, 3))
    assert {level: tuple(tensor.shape) for level, tensor in maps.items()} == {
        level: (2, width, *size) for (level, width), size in zip(backbone.channels.items(), sizes, strict=True)
    }


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_output_is_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    reference = get_model(name).eval()
    backbone = build(name).eval()
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


def test_convnext_output_is_torchvisions() -> None:
    backbone, pixels = tiny_convnext().eval(), torch.randn(2, 3, 64, 96)
    maps = backbone(pixels)
    # Each map is the output of a stage, under its own fresh norm over channels.
    for level, end in (("c2", 2), ("c3", 4), ("c4", 6), ("c5", 8)):
        expected = nn.functional.layer_norm(
            backbone.features[:end](pixels).permute(0, 2, 3, 1), (backbone.channels[level],), eps=1e-6
        )
        torch.testing.assert_close(maps[level], expected.permute(0, 3, 1, 2))


def test_convnext_loses_no_part_of_an_image() -> None:
    # 45 and 70 are no multiples of the patches, which torchvision would cut off at the bottom and the right.
    backbone, pixels = tiny_convnext().eval(), torch.randn(1, 3, 45, 70)
    maps, padded = backbone(pixels), backbone(pad(pixels, (0, 26, 0, 19)))
    for (level, one), size in zip(maps.items(), ((12, 18), (6, 9), (3, 5), (2, 3)), strict=True):
        assert one.shape[-2:] == size
        torch.testing.assert_close(one, padded[level][..., : size[0], : size[1]])
    changed = pixels.clone()
    changed[..., -1, -1] += 1
    assert not torch.equal(backbone(changed)["c2"][..., -1, -1], maps["c2"][..., -1, -1])


def test_swin_pads_the_image_with_zeros_at_the_bottom_and_the_right() -> None:
    backbone, pixels = tiny_swin().eval(), torch.randn(1, 3, 61, 83)
    for one, other in zip(backbone(pixels).values(), backbone(pad(pixels, (0, 1, 0, 3))).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["mobilenet_v2", "swin", "convnext", "efficientnet_b0", "efficientnet_lite0"])
def test_channels_last_and_copies_change_nothing(name: str) -> None:
    backbone, pixels = build(name).eval(), torch.randn(2, 3, 64, 96)
    other = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    maps = other(pixels.contiguous(memory_format=torch.channels_last))
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in maps.values())
    torch.testing.assert_close(maps, backbone(pixels), rtol=1e-4, atol=1e-5)


# mmdetection counts a patch merging and a stage's norm to the stage before, mmpretrain ConvNeXt's steps to the stage
# after; MobileNet v2's and EfficientNet's blocks end at c2..c5.
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
    ("convnext", 0): ("features.0.",),
    ("convnext", 2): ("features.0.", "features.1.", "features.2.", "features.3.", "norm0.", "norm1."),
    ("convnext", 4): ("features.", "norm"),
    ("efficientnet_b0", 0): ("features.0.",),
    ("efficientnet_b0", 1): ("features.0.", "features.1.", "features.2."),
    ("efficientnet_b0", 4): ("features.",),
    ("efficientnet_lite0", 1): ("features.0.", "features.1.", "features.2."),
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
    for name, kind in (("mobilenet_v2", nn.BatchNorm2d), ("swin", nn.LayerNorm), ("convnext", nn.LayerNorm)):
        backbone = build(name)
        backbone.freeze(-1, norm_eval=True)
        norms = [module for module in backbone.train().modules() if isinstance(module, kind)]
        assert norms and all(norm.training == (kind is nn.LayerNorm) for norm in norms)
        assert all(norm.weight.requires_grad for norm in norms)


def test_drop_path_grows_to_the_last_block_and_is_off_in_eval() -> None:
    with torch.device("meta"):
        swin = build_backbone(BackboneConfig(name="swin_t"))
    chances = [module.p for module in swin.modules() if isinstance(module, StochasticDepth)]
    # twelve blocks: 0.2 * block / 11
    assert chances == pytest.approx([0.2 * block / 11 for block in range(12)])
    pixels = torch.randn(8, 3, 32, 32)
    for backbone in (tiny_swin(drop_path=0.9), tiny_convnext(drop_path=0.9)):
        first, second = backbone.train()(pixels)["c5"], backbone(pixels)["c5"]
        assert not torch.equal(first, second)
        assert torch.equal(backbone.eval()(pixels)["c5"], backbone(pixels)["c5"])


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("swin_l", 0.2),
        ("convnext_tiny", 0.4),
        ("convnext_small", 0.6),
        ("convnext_base", 0.7),
        ("convnext_large", 0.7),
        ("efficientnet_b0", 0.0),
        ("efficientnet_b1", 0.2),
        ("efficientnet_v2_s", 0.2),
    ],
)
def test_rates_of_drop_path_are_those_of_the_papers(name: str, rate: float) -> None:
    assert BackboneConfig.model_validate({"name": name}).drop_path_rate == rate
    asked = BackboneConfig.model_validate({"name": name, "drop_path": 0.25})
    assert asked.drop_path_rate == 0.25
    with torch.device("meta"):
        backbone = build_backbone(asked)
    last = max(module.p for module in backbone.modules() if isinstance(module, StochasticDepth))
    assert 0.2 < last <= 0.25  # EfficientNet's counts one block more


@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_norms_of_levels_that_nobody_uses_are_not_trained(name: str) -> None:
    backbone = build(name)
    assert backbone.use_levels(("c3", "c5")) == {"c3": 32, "c5": 128}
    backbone.freeze(1, norm_eval=False)  # whatever comes later
    maps = backbone(torch.randn(1, 3, 32, 32))
    (maps["c3"].sum() + maps["c5"].sum()).backward()
    idle = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
    assert idle == {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert {"norm0.weight", "norm2.bias"} <= idle and not {"norm1.weight", "norm.bias", "norm3.bias"} & idle


def test_recomputed_blocks_of_swin_give_the_same_gradients_and_keep_less() -> None:
    def run(*, recompute: bool) -> tuple[list[Tensor], int]:
        backbone = tiny_swin(drop_path=0.5)
        backbone.recompute = recompute
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        torch.manual_seed(3)  # which blocks are left out
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            maps = backbone.train()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
            total = torch.stack([one.square().sum() for one in maps.values()]).sum()
        total.backward()
        return [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None], kept

    (plain, all_kept), (again, kept) = run(recompute=False), run(recompute=True)
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert kept < all_kept / 3


def test_settings_of_a_family_are_checked() -> None:
    assert BackboneConfig(name="swin_t", recompute=True).recompute
    with pytest.raises(ValidationError, match="only Swin can, not resnet50"):
        BackboneConfig(recompute=True)
    assert {name: BackboneConfig.model_validate({"name": name}).family for name in FAMILIES} == FAMILIES
    assert BackboneConfig(name="swin_t", drop_path=0.3).drop_path == 0.3
    with pytest.raises(ValidationError, match="only Swin, ConvNeXt, EfficientNet and most of timm have it, not resn"):
        BackboneConfig(drop_path=0.1)
