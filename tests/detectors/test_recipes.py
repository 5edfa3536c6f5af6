"""Every row of the paper's table of hyper-parameters, as literal numbers."""

import pytest

from aligndet_cli.backbones import BackboneConfig, WeightsTraining
from aligndet_cli.backbones.layouts import LAYOUTS, NAMINGS
from aligndet_cli.detectors import DETECTORS, DetectorConfig
from aligndet_cli.detectors.cascade_rcnn import CascadeMaskRCNNConfig, CascadeRCNNConfig
from aligndet_cli.detectors.detr import DETRConfig
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.detectors.htc import HTCConfig
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.detectors.recipes import (
    METHODS,
    LabelFacts,
    fit_to_labels,
    images_of_an_epoch,
    recipe_for,
    weights_kind,
)
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.training.recipe import WIDE_SIDES, Freezing, ProjectorRecipe, Rates, Recipe
from aligndet_cli.training.schedules import LENGTHS, build_schedule

# (lr, weight decay, batch size, optimizer, schedule) of pre-training, fine-tuning after it, and fine-tuning without it.
SGD = (16, "sgd", "1x")
ADAMW = (16, "adamw", "1x")
TABLE = [
    (FCOSConfig(), "resnet50", None, "default", [(0.01, 1e-4, *SGD), (0.015, 5e-5, *SGD), (0.01, 1e-4, *SGD)]),
    (RetinaNetConfig(), "resnet50", None, "default", [(0.01, 1e-4, *SGD), (0.015, 5e-5, *SGD), (0.01, 1e-4, *SGD)]),
    (FasterRCNNConfig(), "resnet50", None, "default", [(0.02, 1e-4, *SGD), (0.03, 5e-5, *SGD), (0.02, 1e-4, *SGD)]),
    (MaskRCNNConfig(), "mobilenet_v2", None, "default", [(0.02, 1e-4, *SGD), (0.03, 5e-5, *SGD), (0.02, 1e-4, *SGD)]),
    (MaskRCNNConfig(), "resnet50", "MoCo", "moco-v2", [(0.02, 1e-4, *SGD), (0.02, 5e-6, *SGD), (0.02, 1e-4, *SGD)]),
    (FasterRCNNConfig(), "resnet50", "PixPro", "pixpro", [(0.02, 1e-4, *SGD), (0.02, 5e-6, *SGD), (0.02, 1e-4, *SGD)]),
    (MaskRCNNConfig(), "resnet50", "SwAV", "swav", [(0.02, 1e-4, *SGD), (0.03, 5e-6, *SGD), (0.02, 1e-4, *SGD)]),
    (
        HTCConfig(),
        "cb-swin_l",
        None,
        "cbnet",
        [(1e-4, 5e-2, *ADAMW), (8e-4, 2.5e-3, 128, "adamw", "1x"), (1e-4, 5e-2, *ADAMW)],
    ),
    (HTCConfig(), "cb-resnet50", None, "default", [(0.02, 1e-4, *SGD), (0.03, 5e-5, *SGD), (0.02, 1e-4, *SGD)]),
    (MaskRCNNConfig(), "swin_t", None, "swin", [(1e-4, 5e-2, *ADAMW), (1e-4, 2e-2, *ADAMW), (1e-4, 5e-2, *ADAMW)]),
    (
        RetinaNetConfig(),
        "efficientnet_b0",
        None,
        "default",
        [(0.01, 1e-4, *SGD), (0.015, 5e-5, *SGD), (0.01, 1e-4, *SGD)],
    ),
    (
        RetinaNetConfig(),
        "convnext_tiny",
        "official ConvNeXt",
        "convnext",
        [(1e-4, 5e-2, *ADAMW), (1e-4, 2e-2, *ADAMW), (1e-4, 5e-2, *ADAMW)],
    ),
    (
        MaskRCNNConfig(),
        "swin_b",
        "SimMIM",
        "simmim",
        [(6e-5, 5e-2, 32, "adamw", "1x"), (9e-5, 2.5e-3, 32, "adamw", "3x"), (6e-5, 5e-2, 32, "adamw", "3x")],
    ),
    (
        DETRConfig(),
        "resnet50",
        None,
        "default",
        [
            (2e-4, 1e-4, 64, "adamw", "50e"),
            (1e-4, 1e-4, 16, "adamw", "50e"),
            (1e-4, 1e-4, 16, "adamw", "50e"),
        ],
    ),
]
NOTHING = Freezing(-1, norm_eval=False)


def backbone(name: str) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name})


def recipe_of(detector: DetectorConfig, name: str = "resnet50", layout: str | None = None) -> Recipe:
    return recipe_for(detector, backbone(name), WeightsTraining(layout))


def numbers(rates: Rates) -> tuple[float, float, int, str, str]:
    return rates.lr, rates.weight_decay, rates.batch_size, rates.optimizer, rates.schedule


def every(recipe: Recipe) -> tuple[Rates, Rates, Rates]:
    return recipe.pretrain, recipe.finetune, recipe.plain


@pytest.mark.parametrize(("detector", "backbone_name", "layout", "name", "rows"), TABLE)
def test_rates(detector: DetectorConfig, backbone_name: str, layout: str | None, name: str, rows: list) -> None:
    recipe = recipe_of(detector, backbone_name, layout)
    assert recipe.name == name
    assert [numbers(rates) for rates in every(recipe)] == rows
    assert recipe.norms_in_heads == (name in ("moco-v2", "pixpro", "swav"))
    assert {rates.decays_norms for rates in every(recipe)} == {name not in ("swin", "cbnet", "simmim", "convnext")}
    assert {rates.bias_decay_scale for rates in every(recipe)} == {
        0.0 if name == "convnext" else 1.0
    } or name == "default"
    policy = {"swin": "detr", "simmim": "lsj", "convnext": "detr"}.get(
        name, "detr" if detector.family == "detr" else "resize"
    )
    assert recipe.policy == policy


def test_what_else_the_table_says() -> None:
    fcos = FCOSConfig().RECIPE
    for rates in (fcos.finetune, fcos.plain):
        assert (rates.bias_lr_scale, rates.bias_decay_scale, rates.clip_norm) == (2.0, 0.0, 35.0)
    assert {rates.warmup for rates in every(fcos)} == {"linear"} and fcos.pretrain.clip_norm is None
    detr = DETRConfig().RECIPE
    assert {rates.clip_norm for rates in every(detr)} == {0.1} and {rates.warmup for rates in every(detr)} == {"none"}
    assert detr.finetune.backbone_lr_scale == detr.plain.backbone_lr_scale == 0.1
    swav = recipe_of(MaskRCNNConfig(), "resnet50", "SwAV")
    assert [rates.warmup_steps for rates in every(swav)] == [500, 1000, 500]
    for layout in (None, "SimMIM"):
        swin = recipe_of(MaskRCNNConfig(), "swin_b", layout)
        assert [rates.warmup_steps for rates in every(swin)] == [1000, 1000, 1000]
        assert swin.freezing == NOTHING


def test_cbnet_has_sides_of_a_range_and_no_norm_in_its_neck() -> None:
    recipe = recipe_of(HTCConfig(), "cb-swin_l", None)
    assert recipe.short_sides == tuple(range(400, 1401)) and recipe.neck_norm == "none"
    assert [rates.warmup_steps for rates in every(recipe)] == [500, 500, 500] and recipe.freezing == NOTHING
    assert build_schedule("1x", recipe.plain, num_images=16, batch_size=16).drop_steps == (8, 11)


def test_swin_drops_later_than_simmim() -> None:
    # of 36 epochs, one step each
    swin, simmim = (recipe_of(MaskRCNNConfig(), "swin_b", layout).plain for layout in (None, "SimMIM"))
    assert build_schedule("3x", swin, num_images=16, batch_size=16).drop_steps == (27, 33)
    assert build_schedule("3x", simmim, num_images=16, batch_size=16).drop_steps == (24, 33)


def test_projectors() -> None:
    rcnn = ProjectorRecipe(1024, "normal")
    expected = {
        "retinanet": ProjectorRecipe(256, "normal"),
        "fcos": ProjectorRecipe(256, "normal"),
        "faster-rcnn": rcnn,
        "mask-rcnn": rcnn,
        "cascade-rcnn": rcnn,
        "cascade-mask-rcnn": rcnn,
        "htc": rcnn,
        "detr": ProjectorRecipe(256, "torch"),
    }
    cascades = (CascadeRCNNConfig(), CascadeMaskRCNNConfig(), HTCConfig())
    configs = (RetinaNetConfig(), FCOSConfig(), FasterRCNNConfig(), MaskRCNNConfig(), *cascades, DETRConfig())
    assert {config.family: config.RECIPE.projector for config in configs} == expected
    assert set(expected) == set(DETECTORS)


def test_voc_has_schedules_and_sizes_of_its_own() -> None:
    voc = LabelFacts(is_voc=True)
    for config in (FCOSConfig(), RetinaNetConfig(), FasterRCNNConfig()):
        recipe = fit_to_labels(config.RECIPE, config.family, voc)
        assert (recipe.finetune.schedule, recipe.plain.schedule, recipe.pretrain.schedule) == ("12k", "12k", "1x")
        assert recipe.short_sides == WIDE_SIDES and recipe.policy == "resize" and recipe.freezing is None
        assert recipe.finetune.clip_norm == config.RECIPE.finetune.clip_norm
    detr = fit_to_labels(DETRConfig().RECIPE, "detr", voc)
    assert (detr.policy, detr.freezing, detr.short_sides) == ("resize", Freezing(1, norm_eval=True), WIDE_SIDES)
    for rates in (detr.finetune, detr.plain):
        assert (rates.clip_norm, rates.schedule, rates.warmup, rates.backbone_lr_scale) == (None, "100e", "none", 0.1)
        assert build_schedule("100e", rates, num_images=16, batch_size=16).drop_steps == (70,)


def test_fractions_have_warm_ups_and_lengths_of_their_own() -> None:
    part = LabelFacts(is_fraction=True)
    fcos = fit_to_labels(FCOSConfig().RECIPE, "fcos", part)
    assert {(rates.warmup, rates.clip_norm) for rates in (fcos.finetune, fcos.plain)} == {("constant", None)}
    detr = fit_to_labels(DETRConfig().RECIPE, "detr", part)
    assert {(rates.warmup, rates.clip_norm) for rates in (detr.finetune, detr.plain)} == {("linear", 0.1)}
    for name, steps, drop in (("50e", 375_000, 300_000), ("100e", 750_000, 600_000)):
        for num_all in (118_287, 117_266):  # of which 1 % is chosen
            num_images = images_of_an_epoch(detr, num_all // 100, num_all)
            schedule = build_schedule(name, detr.plain, num_images=num_images, batch_size=16)
            assert (schedule.num_steps, schedule.warmup_steps, schedule.drop_steps) == (steps, 500, (drop,))
    assert images_of_an_epoch(detr, 10, 100) == 100  # another set
    retinanet = RetinaNetConfig().RECIPE
    assert fit_to_labels(retinanet, "retinanet", part) == retinanet
    assert images_of_an_epoch(retinanet, 10, 100) == 10


def test_mobilenet_is_trained_as_a_whole() -> None:
    assert recipe_of(MaskRCNNConfig(), "mobilenet_v2").freezing == NOTHING
    assert recipe_of(MaskRCNNConfig(), "resnet18").freezing is None


def test_schedules() -> None:
    # epochs or steps, and where the rate drops, in the same unit
    assert {
        name: (of.epochs or of.steps, [round((of.epochs or of.steps) * d, 6) for d in of.drops])
        for name, of in LENGTHS.items()
    } == {
        "12k": (12_000, [9_000, 11_000]),
        "90k": (90_000, [60_000, 82_500]),
        "1x": (12, [8, 11]),
        "2x": (24, [16, 22]),
        "3x": (36, [24, 33]),
        "4x": (48, [32, 44]),
        "50e": (50, [40]),
        "90e": (90, [30, 60]),  # pretrain-image
        "100e": (100, [80]),
        "150e": (150, [100]),
        "200e": (200, [120, 160]),  # pretrain-image
        "300e": (300, [180, 240]),  # pretrain-image
    }


def test_what_is_asked_for_wins() -> None:
    resnet, swav = backbone("resnet50"), WeightsTraining("SwAV")
    assert recipe_for(MaskRCNNConfig(), resnet, swav, asked="default") == MaskRCNNConfig().RECIPE
    assert recipe_for(MaskRCNNConfig(), resnet, WeightsTraining(), asked="swav").finetune.weight_decay == 5e-6
    families = "faster-rcnn, mask-rcnn, cascade-rcnn, cascade-mask-rcnn, htc"
    with pytest.raises(ConfigError, match=f"--recipe swav: is for {families}, not for fcos; use default"):
        recipe_for(FCOSConfig(), resnet, WeightsTraining(), asked="swav")


def test_families_without_rates_of_their_own_keep_theirs() -> None:
    known = {layout.name for layout in LAYOUTS} | {naming.name for naming in NAMINGS} | {"self-supervised"}
    assert set(METHODS) <= known
    for layout in METHODS:
        assert recipe_of(FCOSConfig(), "resnet50", layout) == FCOSConfig().RECIPE
    assert recipe_of(DETRConfig(), "swin_t", "SimMIM") == DETRConfig().RECIPE
    assert recipe_of(RetinaNetConfig(), "swin_t", "SimMIM").name == "swin"
    assert recipe_of(MaskRCNNConfig(), "swin_t", "DINO").name == "swin"
    assert recipe_of(MaskRCNNConfig(), "resnet50", "BYOL").norms_in_heads


def test_weights_without_a_classifier_count_as_self_supervised() -> None:
    """Nothing frozen, several sizes and norms in the heads go together (the authors' *_mstrain_1x_coco.py)."""
    mask_rcnn, resnet = MaskRCNNConfig(), backbone("resnet50")
    assert recipe_of(mask_rcnn, "resnet50", "torchvision").name == "self-supervised"
    assert recipe_for(mask_rcnn, resnet, WeightsTraining("torchvision", is_supervised=True)).name == "default"
    assert recipe_of(mask_rcnn, "resnet50", "mmdetection").name == "default"  # of a detector, trained on labels
    assert recipe_of(mask_rcnn, "resnet50").name == "default"  # random
    assert recipe_of(mask_rcnn, "resnet50", "SimMIM").name == "self-supervised"  # SimMIM's own recipe is for Swin
    assert recipe_of(mask_rcnn, "mobilenet_v2", "SimMIM").name == "default"


def test_weights_have_one_word() -> None:
    assert weights_kind(WeightsTraining()) == "none"
    assert weights_kind(WeightsTraining("timm", is_supervised=True)) == "supervised"
    assert weights_kind(WeightsTraining("torchvision")) == "other"
    assert weights_kind(WeightsTraining("MoCo")) == "moco"
