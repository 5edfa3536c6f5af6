import pytest
import torch
from pydantic import ValidationError
from torchvision.models import get_model

from aligndet_cli.backbones import BackboneConfig, build_backbone

# Widths of the four stages: 64 * 2**stage for basic blocks, four times that for bottlenecks (He et al., table 1).
CHANNELS = {
    "resnet18": {"c2": 64, "c3": 128, "c4": 256, "c5": 512},
    "resnet34": {"c2": 64, "c3": 128, "c4": 256, "c5": 512},
    "resnet50": {"c2": 256, "c3": 512, "c4": 1024, "c5": 2048},
    "resnet101": {"c2": 256, "c3": 512, "c4": 1024, "c5": 2048},
}


@pytest.mark.parametrize("name", CHANNELS)
def test_keys_are_torchvisions_without_the_classifier(name: str) -> None:
    with torch.device("meta"):
        backbone, reference = build_backbone(BackboneConfig(name=name)), get_model(name)
    expected = {key: tensor.shape for key, tensor in reference.state_dict().items() if not key.startswith("fc.")}
    assert {key: tensor.shape for key, tensor in backbone.state_dict().items()} == expected


@pytest.mark.parametrize("name", CHANNELS)
def test_maps_have_the_channels_and_strides_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name=name))
        maps = backbone(torch.zeros(2, 3, 64, 96))
    assert backbone.channels == CHANNELS[name]
    assert {level: tuple(tensor.shape) for level, tensor in maps.items()} == {
        level: (2, width, 64 // stride, 96 // stride)
        for (level, width), stride in zip(CHANNELS[name].items(), (4, 8, 16, 32), strict=True)
    }


def test_output_is_torchvisions() -> None:
    torch.manual_seed(0)
    reference = get_model("resnet18").eval()
    backbone = build_backbone(BackboneConfig(name="resnet18")).eval()
    backbone.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")})
    pixels = torch.randn(1, 3, 64, 96)
    c5 = backbone(pixels)["c5"]
    torch.testing.assert_close(reference.fc(c5.mean(dim=(2, 3))), reference(pixels))


def test_fresh_weights_are_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    weight = build_backbone(BackboneConfig(name="resnet18")).layer4[0].conv2.weight
    # sqrt(2 / (512 outputs * 3 * 3)); 2.4 M samples estimate it to 0.05 %
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=5e-3)


@pytest.mark.parametrize(
    ("frozen_stages", "prefixes"),
    [
        ("auto", ()),
        (-1, ()),
        (0, ("conv1.", "bn1.")),
        (1, ("conv1.", "bn1.", "layer1.")),
        (4, ("conv1.", "bn1.", "layer")),
    ],
)
def test_frozen_stages_have_no_gradients(frozen_stages: int, prefixes: tuple[str, ...]) -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", frozen_stages=frozen_stages))
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name


def test_frozen_stages_never_update_their_statistics() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", frozen_stages=1)).train()
    before = {name: tensor.clone() for name, tensor in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    moved = {name for name, tensor in backbone.named_buffers() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if not name.startswith(("bn1.", "layer1."))}


def test_norm_eval_survives_train_and_still_trains_the_affine_part() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", norm_eval=True)).train()
    assert backbone.training and backbone.layer2.training
    before = {name: tensor.clone() for name, tensor in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))["c5"].sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.named_buffers())
    assert backbone.layer4[1].bn2.weight.grad is not None


def test_freeze_replaces_the_earlier_decision() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", frozen_stages=4, norm_eval=True)).train()
    backbone.freeze(-1, norm_eval=False)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.bn1.training and backbone.layer1[0].bn1.training


@pytest.mark.parametrize(
    "options", [{"name": "resnet19"}, {"frozen_stages": 5}, {"frozen_stages": -2}, {"weight": "none"}]
)
def test_wrong_settings_are_refused(options: dict) -> None:
    with pytest.raises(ValidationError):
        BackboneConfig.model_validate(options)
