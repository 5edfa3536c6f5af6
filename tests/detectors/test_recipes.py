"""Every row of the paper's table of hyper-parameters (FACTS 5), as literal numbers."""

import pytest

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.backbones.layouts import LAYOUTS, NAMINGS
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.detectors.detr import DETRConfig
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.detectors.recipes import RECIPE_OF_LAYOUT, recipe_for
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.training.schedules import LENGTHS, Rates

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
    (MaskRCNNConfig(), "swin_t", None, "swin", [(1e-4, 5e-2, *ADAMW), (1e-4, 2e-2, *ADAMW), (1e-4, 5e-2, *ADAMW)]),
    (
        MaskRCNNConfig(),
        "swin_b",
        "SimMIM",
        "simmim",
        [(1e-4, 5e-2, *ADAMW), (9e-5, 2.5e-3, 32, "adamw", "3x"), (6e-5, 5e-2, 32, "adamw", "3x")],
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


def backbone(name: str) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name})


def numbers(rates: Rates) -> tuple[float, float, int, str, str]:
    return rates.lr, rates.weight_decay, rates.batch_size, rates.optimizer, rates.schedule


@pytest.mark.parametrize(("detector", "backbone_name", "layout", "name", "rows"), TABLE)
def test_rates(detector: DetectorConfig, backbone_name: str, layout: str | None, name: str, rows: list) -> None:
    recipe = recipe_for(detector, backbone(backbone_name), layout)
    assert recipe.name == name
    assert [numbers(rates) for rates in (recipe.pretrain, recipe.finetune, recipe.plain)] == rows
    assert recipe.norms_in_heads == (name in ("moco-v2", "pixpro", "swav"))
    every = (recipe.pretrain, recipe.finetune, recipe.plain)
    assert {rates.decays_norms for rates in every} == {name not in ("swin", "simmim")}
    assert recipe.policy == ("detr" if detector.family == "detr" else "lsj" if name == "simmim" else "resize")


def test_what_else_the_table_says() -> None:
    fcos = FCOSConfig().RECIPE
    for rates in (fcos.finetune, fcos.plain):
        assert (rates.bias_lr_scale, rates.bias_decay_scale, rates.clip_norm) == (2.0, 0.0, 35.0)
    assert {rates.warmup for rates in (fcos.pretrain, fcos.finetune, fcos.plain)} == {"constant"}
    detr = DETRConfig().RECIPE
    assert {rates.clip_norm for rates in (detr.pretrain, detr.finetune, detr.plain)} == {0.1}
    assert detr.finetune.backbone_lr_scale == detr.plain.backbone_lr_scale == 0.1
    swav = recipe_for(MaskRCNNConfig(), backbone("resnet50"), "SwAV")
    assert [rates.warmup_steps for rates in (swav.pretrain, swav.finetune, swav.plain)] == [500, 1000, 500]


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
        "100e": (100, [70]),
        "150e": (150, [100]),
        "200e": (200, [120, 160]),  # pretrain-image
    }


def test_what_is_asked_for_wins() -> None:
    assert recipe_for(MaskRCNNConfig(), backbone("resnet50"), "SwAV", asked="default") == MaskRCNNConfig().RECIPE
    assert recipe_for(MaskRCNNConfig(), backbone("resnet50"), None, asked="swav").finetune.weight_decay == 5e-6
    with pytest.raises(ConfigError, match=r"--recipe swav: is for faster-rcnn, mask-rcnn, not for fcos; use default"):
        recipe_for(FCOSConfig(), backbone("resnet50"), None, asked="swav")


def test_families_without_rates_of_their_own_keep_theirs() -> None:
    known = {layout.name for layout in LAYOUTS} | {naming.name for naming in NAMINGS}
    assert set(RECIPE_OF_LAYOUT) <= known
    for layout in RECIPE_OF_LAYOUT:
        assert recipe_for(FCOSConfig(), backbone("resnet50"), layout) == FCOSConfig().RECIPE
    assert recipe_for(DETRConfig(), backbone("swin_t"), "SimMIM") == DETRConfig().RECIPE
    assert recipe_for(RetinaNetConfig(), backbone("swin_t"), "SimMIM").name == "swin"
    assert recipe_for(MaskRCNNConfig(), backbone("swin_t"), "DINO").name == "swin"
    assert recipe_for(MaskRCNNConfig(), backbone("resnet50"), "BYOL").norms_in_heads
