from dataclasses import replace

import pytest
from torch import nn
from torchvision.models.swin_transformer import SwinTransformerBlock

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.optimizer import build_optimizer
from aligndet_cli.training.recipe import Rates
from aligndet_cli.training.schedules import build_schedule
from aligndet_cli.training.settings import TrainingConfig, resolve_settings

RATES = Rates(0.01, 1e-4, "a recipe")


def test_1x_of_coco_is_the_published_schedule() -> None:
    # 117,266 images at batch 16: 7,330 steps an epoch; drops after epochs 8 and 11 of 12.
    schedule = build_schedule("1x", RATES, num_images=117_266, batch_size=16)
    assert (schedule.num_steps, schedule.warmup_steps) == (12 * 7330, 500)
    assert schedule.drop_steps == (8 * 7330, 11 * 7330)


def test_12k_drops_at_9k_and_11k() -> None:
    schedule = build_schedule("12k", RATES, num_images=10, batch_size=16)
    assert (schedule.num_steps, schedule.drop_steps) == (12_000, (9_000, 11_000))


def test_90k_drops_at_60k_and_82_5k() -> None:
    assert build_schedule("90k", RATES, num_images=1, batch_size=1).drop_steps == (60_000, 82_500)


def test_learning_rate_warms_up_and_drops() -> None:
    schedule = build_schedule("12k", RATES, num_images=10, batch_size=16)
    assert schedule.lr_factor(0) == pytest.approx(0.001)
    assert schedule.lr_factor(250) == pytest.approx(0.5005)  # 0.001 + 0.999 / 2
    assert schedule.lr_factor(500) == schedule.lr_factor(8_999) == 1.0
    assert schedule.lr_factor(9_000) == pytest.approx(0.1)
    assert schedule.lr_factor(11_999) == pytest.approx(0.01)


def test_short_runs_warm_up_for_a_tenth() -> None:
    assert build_schedule("1x", RATES, steps=40, num_images=10, batch_size=16).warmup_steps == 4


def test_epochs_and_steps_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        build_schedule("1x", RATES, epochs=1, steps=1, num_images=1, batch_size=1)


def test_constant_warm_up_is_a_third() -> None:
    schedule = build_schedule("12k", replace(RATES, warmup="constant"), num_images=1, batch_size=1)
    assert schedule.lr_factor(0) == schedule.lr_factor(499) == pytest.approx(1 / 3)
    assert schedule.lr_factor(500) == 1.0


def test_cosine_falls_from_the_full_rate_to_nothing() -> None:
    schedule = build_schedule("100e", replace(RATES, warmup="none", decay="cosine"), num_images=40, batch_size=10)
    assert (schedule.num_steps, schedule.drop_steps, schedule.warmup_steps) == (400, (), 0)
    assert [schedule.lr_factor(step) for step in (0, 100, 200, 300)] == pytest.approx(
        [1.0, 0.853553, 0.5, 0.146447], abs=1e-6
    )
    assert schedule.lr_factor(399) < 1e-4


def test_rate_scales_with_the_batch_unless_given() -> None:
    rates = Rates(0.01, 1e-4, "a recipe", bias_lr_scale=2.0, bias_decay_scale=0.0, backbone_lr_scale=0.1)
    numbers = {"num_images": 10, "seed": 0, "runtime": RuntimeConfig()}
    scaled = resolve_settings(TrainingConfig(batch_size=64), rates, **numbers)
    assert (scaled.base_lr, scaled.weight_decay) == (pytest.approx(0.04), 1e-4)
    assert resolve_settings(TrainingConfig(batch_size=64, lr=0.3), rates, **numbers).base_lr == 0.3

    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2), "norm": nn.GroupNorm(1, 2)})
    groups = build_optimizer(model, rates, scaled, Process()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1, 3, 1]  # the norm's shift is no bias
    # backbone weights, backbone biases, head weights, head biases
    assert [group["lr_scale"] for group in groups] == pytest.approx([0.1, 0.2, 1.0, 2.0])
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0, 1e-4, 0.0]


def test_norms_and_position_biases_may_be_left_from_decay() -> None:
    """Swin: of a block's parameters only the weights and biases of its linear layers decay."""
    block = SwinTransformerBlock(8, 2, [2, 2], [0, 0])
    rates = Rates(1e-4, 0.05, "a recipe", optimizer="adamw", decays_norms=False)
    settings = resolve_settings(TrainingConfig(steps=10), rates, num_images=10, seed=0, runtime=RuntimeConfig())
    groups = build_optimizer(block, rates, settings, Process()).param_groups
    kept = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    names = {name for name, p in block.named_parameters() if id(p) in kept}
    norms = {f"norm{number}.{part}" for number in (1, 2) for part in ("weight", "bias")}
    assert names == {"attn.relative_position_bias_table", *norms}
    everything = build_optimizer(block, Rates(1e-4, 0.05, "a recipe"), settings, Process()).param_groups
    assert {group["weight_decay"] for group in everything} == {0.05}


def test_warm_up_may_be_longer() -> None:
    schedule = build_schedule("90k", replace(RATES, warmup_steps=1000), num_images=1, batch_size=1)
    assert schedule.warmup_steps == 1000 and schedule.lr_factor(500) == pytest.approx(0.5005)


def test_a_recipe_may_drop_elsewhere() -> None:
    # Swin's 3x drops after epochs 27 and 33 of 36, the others' after 24 and 33.
    swin = replace(RATES, drops=(("3x", (27 / 36, 33 / 36)),))
    assert build_schedule("3x", swin, num_images=100, batch_size=10).drop_steps == (270, 330)
    assert build_schedule("3x", RATES, num_images=100, batch_size=10).drop_steps == (240, 330)
    assert build_schedule("1x", swin, num_images=100, batch_size=10).drop_steps == (80, 110)


def test_a_part_may_keep_its_rate() -> None:
    model = nn.ModuleDict({"projector": nn.Linear(2, 2), "predictor": nn.Linear(2, 2)})
    rates = Rates(0.05, 1e-4, "a recipe", constant_lr=("predictor",))
    settings = resolve_settings(
        TrainingConfig(batch_size=16, steps=10), rates, num_images=10, seed=0, runtime=RuntimeConfig()
    )
    groups = build_optimizer(model, rates, settings, Process()).param_groups
    constant = {id(p) for group in groups if group["constant_lr"] for p in group["params"]}
    assert constant == {id(p) for p in model["predictor"].parameters()}
