"""Two linked backbones: the links, what they start with, and what of them is frozen and filled."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from aligndet_cli.backbones import (
    ASSISTANT,
    COMPOSITES,
    BackboneConfig,
    CompositeBackbone,
    build_backbone,
    load_backbone_weights,
    torchvision_weights,
)
from aligndet_cli.backbones.resnet import ResNet
from aligndet_cli.backbones.swin import Swin
from aligndet_cli.errors import WeightsError
from helpers.narrow import build_narrow
from helpers.plain_composite import lead_maps


def tiny_swin() -> Swin:
    return Swin(SwinTransformer([4, 4], 8, [1, 2, 1, 1], [1, 2, 4, 8], [7, 7], stochastic_depth_prob=0.0), "swin_tiny")


def tiny_resnet() -> ResNet:
    return ResNet(build_narrow("resnet18"), "resnet18")


BUILD = {"resnet": tiny_resnet, "swin": tiny_swin}


def build(family: str) -> CompositeBackbone:
    torch.manual_seed(0)
    return CompositeBackbone(BUILD[family](), BUILD[family]()).eval()


def shake(backbone: nn.Module) -> None:
    """Give all tensors values that differ, those of links too, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in backbone.state_dict().items():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, generator=generator))
                assert value.abs().sum() > 0, name


def make_pixels(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("size", [(64, 96), (61, 83)])
def test_maps_of_the_lead_are_those_of_loops(family: str, size: tuple[int, int]) -> None:
    backbone, pixels = build(family), make_pixels(1, 3, *size)
    shake(backbone)
    expected = lead_maps(backbone, pixels)
    maps = backbone(pixels)
    assert list(maps) == ["c2", "c3", "c4", "c5"]
    for one, other in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", BUILD)
def test_the_assistant_is_the_backbone_itself(family: str) -> None:
    backbone, pixels = build(family), make_pixels(2, 3, 61, 83)
    shake(backbone)
    maps = backbone(pixels, with_assistant=True)
    alone = backbone.assistant(pixels)
    assert len(maps) == 8
    for level, one in alone.items():
        assert torch.equal(maps[ASSISTANT + level], one)
        assert maps[level].shape == one.shape
        is_shared = family == "resnet" and level == "c2"  # the lead takes the first stage over
        assert torch.equal(maps[level], one) == is_shared


def test_links_of_a_resnet_add_nothing_at_first() -> None:
    backbone, pixels = build("resnet"), make_pixels(1, 3, 64, 64)
    load = {
        name: value for name, value in backbone.assistant.state_dict().items() if name in backbone.lead.state_dict()
    }
    backbone.lead.load_state_dict(load)
    maps = backbone(pixels, with_assistant=True)
    for level in backbone.channels:
        assert torch.equal(maps[level], maps[ASSISTANT + level])


def test_a_swin_gets_the_map_of_its_level_at_first() -> None:
    backbone, pixels = build("swin"), make_pixels(1, 3, 64, 64)
    maps = backbone(pixels, with_assistant=True)
    hidden = backbone.assistant.begin(pixels) + maps[f"{ASSISTANT}c2"]
    torch.testing.assert_close(backbone.lead.run_stage(0, hidden)[0], maps["c2"])


@pytest.mark.parametrize("family", BUILD)
def test_gradients_reach_all_of_both(family: str) -> None:
    backbone = build(family).train()
    maps = backbone(make_pixels(2, 3, 64, 64))
    sum(one.square().sum() for one in maps.values()).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []
    started = [name for name, p in backbone.named_parameters() if name.startswith("links") and p.grad.abs().sum() > 0]
    assert started  # those that begin at zero learn


# Of the assistant and the lead; a ResNet's lead has no stem and no first stage, a Swin's no patches. Links are free.
FROZEN = {
    ("resnet", -1): (),
    ("resnet", 0): ("assistant.conv1.", "assistant.bn1."),
    ("resnet", 1): ("assistant.conv1.", "assistant.bn1.", "assistant.layer1."),
    ("resnet", 2): tuple(f"assistant.{n}." for n in ("conv1", "bn1", "layer1", "layer2")) + ("lead.layer2.",),
    ("swin", 0): ("assistant.features.0.",),
    ("swin", 1): (
        *(f"assistant.{name}." for name in ("features.0", "features.1", "features.2", "norm0")),
        *(f"lead.{name}." for name in ("features.1", "features.2", "norm0")),
    ),
}


@pytest.mark.parametrize(("family", "frozen_stages"), FROZEN)
def test_stages_of_both_are_frozen_and_links_are_not(family: str, frozen_stages: int) -> None:
    backbone = build(family)
    backbone.freeze(frozen_stages, norm_eval=False)
    prefixes = FROZEN[family, frozen_stages]
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name
    for name, module in backbone.train().named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training != f"{name}.".startswith((*prefixes, "links.")), name


def test_norms_of_links_keep_their_statistics() -> None:
    backbone = build("resnet").train()
    norms = [module for module in backbone.links.modules() if isinstance(module, nn.BatchNorm2d)]
    backbone(make_pixels(2, 3, 64, 64))
    assert norms and all(norm.num_batches_tracked == 0 and norm.weight.requires_grad for norm in norms)
    backbone.freeze(-1, norm_eval=True)
    assert not any(module.training for module in backbone.train().modules() if isinstance(module, nn.BatchNorm2d))


def test_links_learn_where_the_norms_of_both_are_fixed() -> None:
    backbone = build("resnet").train()
    backbone.fix_norms()
    assert not any(
        parameter.requires_grad
        for part in (backbone.assistant, backbone.lead)
        for module in part.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    )
    maps = backbone(make_pixels(2, 3, 64, 64))
    sum(one.square().sum() for one in maps.values()).backward()
    scales = [module.weight.grad for module in backbone.links.modules() if isinstance(module, nn.BatchNorm2d)]
    assert scales and all(scale is not None and scale.abs().sum() > 0 for scale in scales)


def test_a_level_that_no_one_wants_stops_the_norm_of_the_lead_alone() -> None:
    backbone = build("swin")
    backbone.use_levels(("c3", "c4", "c5"))
    idle = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert idle == {"lead.norm0.weight", "lead.norm0.bias"}  # the assistant's map goes to the lead


@pytest.mark.parametrize("name", COMPOSITES)
def test_each_name_has_the_channels_of_one(name: str) -> None:
    with torch.device("meta"):
        both = build_backbone(BackboneConfig.model_validate({"name": name}))
        one = build_backbone(BackboneConfig.model_validate({"name": name.removeprefix("cb-")}))
        assert isinstance(both, CompositeBackbone) and both.name == name and both.channels == one.channels
        assert both.family == one.family
        shapes = {level: maps.shape for level, maps in one(torch.zeros(1, 3, 96, 64)).items()}
        assert {level: maps.shape for level, maps in both(torch.zeros(1, 3, 96, 64)).items()} == shapes


def test_a_file_of_one_fills_both(tmp_path: Path) -> None:
    source = build_backbone(BackboneConfig(name="resnet18"))
    shake(source)
    torch.save(source.state_dict(), tmp_path / "one.pth")
    backbone = build_backbone(BackboneConfig(name="cb-resnet18"))
    links = {name: value.clone() for name, value in backbone.links.state_dict().items()}
    load_backbone_weights(backbone, tmp_path / "one.pth")
    for part in (backbone.assistant, backbone.lead):
        for name, value in part.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name
    assert {name.split(".")[0] for name in backbone.lead.state_dict()} == {"layer2", "layer3", "layer4"}
    assert all(torch.equal(value, links[name]) for name, value in backbone.links.state_dict().items())
    with pytest.raises(WeightsError, match="do not fit resnet34"):
        load_backbone_weights(build_backbone(BackboneConfig(name="cb-resnet34")), tmp_path / "one.pth")


def test_weights_by_name_are_those_of_one() -> None:
    assert torchvision_weights("cb-resnet50") == torchvision_weights("resnet50") != {}


def test_settings_reach_both() -> None:
    with torch.device("meta"):
        swin = build_backbone(BackboneConfig(name="cb-swin_t", recompute=True, drop_path=0.25))
        resnet = build_backbone(BackboneConfig(name="cb-resnet50", stride_in_1x1=True))
    for part in (swin.assistant, swin.lead):
        assert part.recompute and part.features[7][1].stochastic_depth.p == 0.25
    for part in (resnet.assistant, resnet.lead):
        assert part.layer2[0].conv1.stride == (2, 2)


@pytest.mark.parametrize("name", ["cb-mobilenet_v2", "cb-timm:resnet50", "cb-", "cb-cb-resnet18"])
def test_others_do_not_go_in_twos(name: str) -> None:
    with pytest.raises(ValidationError, match="only ResNets and Swins of ours go in twos: cb-resnet18, "):
        BackboneConfig.model_validate({"name": name})
