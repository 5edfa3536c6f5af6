"""Names and settings of backbones of timm: what they are called, drop path, and what lies outside of all modules."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from aligndet_cli.backbones import Backbone, BackboneConfig, WeightsTraining, build_backbone
from aligndet_cli.config import RuntimeConfig
from aligndet_cli.detectors.recipes import recipe_for
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.optimizer import build_optimizer
from aligndet_cli.training.settings import TrainingConfig, resolve_settings
from helpers.commandline import NECK, RANDOM, RESOLUTION, aligndet

timm = pytest.importorskip("timm")


def build(name: str, drop_path: float | str = "auto") -> Backbone:
    with torch.device("meta"):
        return build_backbone(BackboneConfig.model_validate({"name": f"timm:{name}", "drop_path": drop_path}))


# ---- names ----


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "timm has no such network; timm.list_models() lists those that it has"),
        ("../x", "timm has no such network; timm.list_models() lists those that it has"),
        ("ResNet18", "timm has no such network; did you mean 'resnet18'?"),
        ("convnext_tiny_in22k", "timm has a new name for it; use --backbone timm:convnext_tiny.fb_in22k"),
        ("vit_small_patch16_224_dino", "timm has a new name for it; use --backbone timm:vit_small_patch16_224.dino"),
    ],
)
def test_names_that_timm_does_not_have_are_answered_in_a_few_words(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(name)
    assert str(caught.value) == f"--backbone timm:{name}: {said}"


def test_a_vit_behind_convolutions_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot serve, a network of convolutions makes its patches"):
        build("vit_tiny_r_s16_p8_224")


# ---- drop path ----


def rates(backbone: Backbone) -> list[float]:
    return [module.drop_prob for module in backbone.modules() if isinstance(module, timm.layers.DropPath)]


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("vit_tiny_patch16_224", 0.1),  # ViTDet's B, of twelve blocks
        ("vit_small_patch14_dinov2", 0.1),
        ("vit_small_patch16_dinov3", 0.1),
        ("vit_large_patch16_224", 0.4),  # L
        ("vit_huge_patch14_224", 0.5),  # H
        ("vit_giant_patch14_dinov2", 0.5),  # 40 blocks: H is the nearest
        ("convnext_tiny", 0.4),  # as of those here
        ("convnext_tiny.dinov3_lvd1689m", 0.4),
        ("convnext_base", 0.7),
        ("convnext_xlarge", 0.8),
        ("swin_tiny_patch4_window7_224", 0.2),
    ],
)
def test_rates_of_drop_path_are_those_of_detectors(name: str, rate: float) -> None:
    assert max(rates(build(name))) == pytest.approx(rate)


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_tiny", "resnet18", "efficientnet_b0"])
def test_others_have_none_unless_it_is_asked_for(name: str) -> None:
    assert rates(build(name)) == []
    asked = rates(build(name, 0.25))
    assert asked == sorted(asked) and 0.2 < asked[-1] <= 0.25  # EfficientNet's counts one block more


def test_a_rate_of_zero_is_one() -> None:
    assert rates(build("vit_tiny_patch16_224", 0.0)) == []


@pytest.mark.parametrize("name", ["vgg11_bn", "densenet121"])
def test_it_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(ValidationError, match=f"and most of timm have it, not timm:{name}; leave it out"):
        build(name, 0.25)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_paths_are_left_out_in_training_alone_and_not_in_frozen_stages(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig.model_validate({"name": f"timm:{name}", "drop_path": 0.9})).train()
    pixels = torch.randn(8, 3, 32, 32)

    def is_random() -> bool:
        with torch.no_grad():
            return not torch.equal(backbone(pixels)["c5"], backbone(pixels)["c5"])

    assert is_random()
    backbone.freeze(4, norm_eval=False)
    assert not is_random()
    backbone.freeze(-1, norm_eval=False)
    backbone.eval()
    assert not is_random()


def test_a_rate_without_effect_is_refused(chain: Path) -> None:
    words = (
        "-w",
        chain,
        "--detector",
        "retinanet",
        "--backbone",
        "timm:convnext_atto",
        *NECK,
        *RESOLUTION,
        "--dry-run",
    )
    rate = ("--set", "backbone.drop_path=0.3")
    ran = aligndet("pretrain-box", *words, *RANDOM, *rate, code=2)
    said = "backbone.drop_path: no effect on a frozen backbone; leave it out, or"
    assert ran.error_line().endswith(f"{said} --no-freeze-backbone")
    frozen = ("--set", "backbone.frozen_stages=4", "--init", "scratch")
    ran = aligndet("finetune", *words, *rate, *frozen, code=2)
    assert ran.error_line().endswith(f"{said} free some stages")
    swin = ("--backbone", "swin_t", "--set", "backbone.recompute=true")
    ran = aligndet("finetune", *words, *swin, *frozen, code=2)
    assert ran.error_line().endswith(
        "backbone.recompute: no effect on a frozen backbone; leave it out, or free some stages"
    )
    assert aligndet("finetune", *words, *rate, "--init", "scratch", "--steps", "1", "--batch-size", "2").code == 0


# ---- decay ----


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3_qkvb", "vit_small_patch14_dinov2", "deit_tiny_distilled_patch16_224"]
)
def test_of_a_vit_matrices_alone_decay(name: str) -> None:
    """As in ViTDet positions, tokens and norms do not, and as in ConvNeXt no biases and scales of layers."""
    backbone = build(name)
    training = WeightsTraining("timm", is_supervised=True)
    rates = recipe_for(RetinaNetConfig(), BackboneConfig.model_validate({"name": f"timm:{name}"}), training).plain
    asked = TrainingConfig(steps=10)
    settings = resolve_settings(asked, rates, num_images=10, seed=0, runtime=RuntimeConfig())
    names = {id(parameter): key for key, parameter in backbone.named_parameters()}
    groups = build_optimizer(backbone, rates, settings, Process()).param_groups
    decaying = {names[id(one)] for group in groups if group["weight_decay"] for one in group["params"]}
    assert len(decaying) >= 4 * 12
    assert all(key.endswith(".weight") and backbone.get_parameter(key).ndim > 1 for key in decaying)


# ---- parts ----


def test_positions_that_no_module_has_are_in_the_stem() -> None:
    backbone = build("hieradet_small")
    whole = dict(backbone.named_parameters())
    assert {"body.model.pos_embed", "body.model.pos_embed_window"} <= whole.keys()
    parts = [backbone.stem(), *backbone.stages()]
    found = [id(one) for part in parts for module in part for one in module.parameters()]
    assert sorted(found) == sorted(map(id, whole.values()))
    backbone.freeze(4, norm_eval=False)
    assert not any(one.requires_grad for one in backbone.parameters())
