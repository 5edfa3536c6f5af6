"""Learning rates of a backbone that fall from layer to layer towards its start, beside tables written by hand."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aligndet_cli.backbones import BackboneConfig, WeightsTraining, build_backbone
from aligndet_cli.config import RuntimeConfig
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.detectors.cascade_rcnn import CascadeMaskRCNNConfig
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.detectors.recipes import recipe_for
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.checkpoint import save_checkpoint
from aligndet_cli.training.loop import Learner, LoopSettings, train
from aligndet_cli.training.optimizer import build_optimizer
from aligndet_cli.training.recipe import Rates, Recipe
from aligndet_cli.training.schedules import Schedule
from aligndet_cli.training.settings import TrainingConfig, resolve_settings
from helpers.commandline import CHAIN, DETECTOR, NECK, RESOLUTION, aligndet
from helpers.linear_learner import LeastSquares

# By the start of a parameter's name, the layers between it and the neck, one more than that is the power of the decay.
# The ConvNeXt authors' `get_num_layer_layer_wise` with six layers, in torchvision's names: the stem is 0, the first
# stage 1, the second with the step to it 2, the third from 3 on with three blocks each, the last 6, all else 7.
CONVNEXT_TINY = {
    "backbone.features.0.": 7,
    "backbone.features.1.": 6,
    "backbone.features.2.": 5,
    "backbone.features.3.": 5,
    "backbone.features.4.": 4,
    **{f"backbone.features.5.{block}.": power for block, power in enumerate((4, 4, 4, 3, 3, 3, 2, 2, 2))},
    "backbone.features.6.": 1,
    "backbone.features.7.": 1,
    **{f"backbone.norm{level}.": 0 for level in range(4)},
}
# The same with twelve: 27 blocks make nine layers.
CONVNEXT_BASE = CONVNEXT_TINY | {
    "backbone.features.0.": 13,
    "backbone.features.1.": 12,
    "backbone.features.2.": 11,
    "backbone.features.3.": 11,
    "backbone.features.4.": 10,
    **{
        f"backbone.features.5.{block}.": power
        for block, power in enumerate(
            (10, 10, 10, 9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6, 5, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2),
        )
    },
}
# timm's names of a tiny one.
TIMM_CONVNEXT = {
    "backbone.body.stem_0.": 7,
    "backbone.body.stem_1.": 7,
    "backbone.body.stages_0.": 6,
    "backbone.body.stages_1.": 5,
    "backbone.body.stages_2.downsample.": 4,
    **{f"backbone.body.stages_2.blocks.{block}.": power for block, power in enumerate((4, 4, 4, 3, 3, 3, 2, 2, 2))},
    "backbone.body.stages_3.": 1,
}
# detectron2's `get_vit_lr_decay_rate` with twelve layers: patches and positions are 0, block N is N + 1, all else 13.
VIT = {
    "backbone.body.patch_embed.": 13,
    "backbone.body.pos_embed": 13,
    "backbone.body.cls_token": 13,
    **{f"backbone.body.blocks.{block}.": 12 - block for block in range(12)},
    "backbone.body.norm.": 0,
}
TABLES = {
    "convnext_tiny": CONVNEXT_TINY,
    "convnext_base": CONVNEXT_BASE,
    "timm:convnext_tiny": TIMM_CONVNEXT,
    "timm:vit_tiny_patch16_224": VIT,
}


def backbone_of(name: str) -> BackboneConfig:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    return BackboneConfig.model_validate({"name": name})


def recipe_of(detector: DetectorConfig, name: str, **asked: str) -> Recipe:
    return recipe_for(detector, backbone_of(name), WeightsTraining("timm", is_supervised=True), **asked)


def scales(model: torch.nn.Module, rates: Rates, layers: list, **training: float) -> Iterator[tuple[str, float]]:
    config = TrainingConfig.model_validate({"steps": 10, **training})
    settings = resolve_settings(config, rates, num_images=10, seed=0, runtime=RuntimeConfig())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in build_optimizer(model, rates, settings, Process(), layers).param_groups:
        yield from ((names[id(parameter)], group["lr_scale"]) for parameter in group["params"])


@pytest.mark.parametrize("name", TABLES)
def test_every_parameter_has_the_rate_of_its_layer(name: str) -> None:
    with torch.device("meta"):
        model = FCOSConfig().build(build_backbone(backbone_of(name)), 3)
    rates = recipe_of(RetinaNetConfig(), name).plain
    found = dict(scales(model, rates, model.backbone.layers(), layer_decay=0.5))
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen = set()
    for parameter, scale in found.items():
        starts = [start for start in TABLES[name] if parameter.startswith(start)]
        assert len(starts) == parameter.startswith("backbone."), parameter
        seen |= set(starts)
        assert scale == 0.5 ** sum(TABLES[name][start] for start in starts), parameter
    # FCOS has no use for c2, so its norm is not trained.
    assert seen == TABLES[name].keys() - {"backbone.norm0."}


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "cb-resnet18", "efficientnet_lite0"])
def test_layers_of_others_are_stem_and_stages_if_asked_for(name: str) -> None:
    with torch.device("meta"):
        model = RetinaNetConfig().build(build_backbone(backbone_of(name)), 3)
    plain = recipe_of(RetinaNetConfig(), name).plain
    assert {scale for _, scale in scales(model, plain, model.backbone.layers())} == {1.0}
    found = {}
    for parameter, scale in scales(model, plain, model.backbone.layers(), layer_decay=0.5):
        found.setdefault(scale, parameter)
    assert set(found) == {1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125}
    stem = {"resnet18": "backbone.conv1", "cb-resnet18": "backbone.assistant.conv1"}.get(name, "backbone.features.0.")
    assert found[0.03125].startswith(stem)


@pytest.mark.parametrize(
    ("detector", "name", "lr", "layer_decay"),
    [
        (MaskRCNNConfig(), "convnext_tiny", 1e-4, 0.95),
        (RetinaNetConfig(), "convnext_large", 1e-4, 0.95),
        (CascadeMaskRCNNConfig(), "convnext_tiny", 2e-4, 0.7),
        (CascadeMaskRCNNConfig(), "convnext_small", 2e-4, 0.7),
        (CascadeMaskRCNNConfig(), "convnext_base", 2e-4, 0.8),
        (CascadeMaskRCNNConfig(), "convnext_large", 1e-4, 0.7),
        (CascadeMaskRCNNConfig(), "timm:convnext_base.fb_in22k", 2e-4, 0.8),
        (CascadeMaskRCNNConfig(), "timm:convnextv2_base", 1e-4, 0.95),
        (MaskRCNNConfig(), "timm:vit_base_patch16_224", 1e-4, 0.7),
        (CascadeMaskRCNNConfig(), "timm:vit_large_patch16_224", 1e-4, 0.8),
        (MaskRCNNConfig(), "timm:vit_huge_patch14_224", 1e-4, 0.9),
        (MaskRCNNConfig(), "timm:swin_tiny_patch4_window7_224", 1e-4, 1.0),
        (MaskRCNNConfig(), "swin_t", 1e-4, 1.0),
        (MaskRCNNConfig(), "resnet50", 0.02, 1.0),
    ],
)
def test_recipes_have_the_decay_of_the_published_configs(
    detector: DetectorConfig, name: str, lr: float, layer_decay: float
) -> None:
    recipe = recipe_of(detector, name)
    assert [(rates.lr, rates.layer_decay) for rates in (recipe.pretrain, recipe.plain)] == [(lr, layer_decay)] * 2
    assert recipe.finetune.layer_decay == layer_decay


def test_a_recipe_that_is_asked_for_has_it_for_its_own_backbones_only() -> None:
    assert recipe_of(RetinaNetConfig(), "resnet18", asked="convnext").plain.layer_decay == 1.0
    assert recipe_of(RetinaNetConfig(), "convnext_tiny", asked="swin").plain.layer_decay == 1.0


def test_the_settings_that_hold_are_shown(chain: Path) -> None:
    words = ("finetune", "-w", chain, "--detector", "retinanet", "--backbone", "convnext_tiny", *NECK, *RESOLUTION)
    words = (*words, "--init", "scratch", "--steps", "2", "--batch-size", "2", "--dry-run")
    shown = aligndet(*words).stderr
    assert re.search(r"optimizer +adamw, each layer of the backbone at 0.95 times the rate of the next one, bi", shown)
    assert "backbone at 0.6 times" in aligndet(*words, "--set", "training.layer_decay=0.6").stderr
    assert "each layer" not in aligndet(*words, "--set", "training.layer_decay=1").stderr


def test_a_decay_without_effect_is_refused(chain: Path) -> None:
    decay = ("--set", "training.layer_decay=0.7")
    ran = aligndet("pretrain-box", "-w", chain, *CHAIN["pretrain-box"], *decay, "--name", "other", code=2)
    assert "training.layer_decay: no effect on a frozen backbone" in ran.error_line()
    frozen = ("--set", "backbone.frozen_stages=4", "--init", "scratch")
    ran = aligndet("finetune", "-w", chain, *DETECTOR, *NECK, *decay, *frozen, "--name", "other", code=2)
    assert "training.layer_decay: no effect on a frozen backbone" in ran.error_line()


def test_a_run_that_was_begun_with_other_groups_is_not_continued(tmp_path: Path) -> None:
    task = LeastSquares()
    one, other = list(task.parameters()), [{"params": [parameter]} for parameter in task.parameters()]
    learner = Learner(model=task, optimizer=torch.optim.SGD(one, lr=0.1), state={"task": task})
    state = {"task": task.state_dict(), "scaler": learner.scaler.state_dict()}
    save_checkpoint(tmp_path / "resume", 1, {**state, "optimizer": torch.optim.SGD(other, lr=0.1).state_dict()})
    settings = LoopSettings(Schedule(4, 0, ()), base_lr=0.1, weight_decay=0.0, seed=0)
    with pytest.raises(ConfigError, match="was begun by an older aligndet, .* --no-resume begins again"):
        train(learner, lambda _: iter(()), settings, tmp_path, Process())
