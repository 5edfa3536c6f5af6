"""Which recipe a detector is trained with: by its family, its backbone, and where the backbone's weights come from.

Source: FACTS 5, tables 3 to 5 of the paper and the configs of its released runs. The paper trained CBNet v2 (an HTC)
too, which is no family here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.backbones.weights import read_backbone
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.training.schedules import Rates, Recipe, RecipeName

RCNN = ("faster-rcnn", "mask-rcnn")
SELF_SUPERVISED: RecipeName = "self-supervised"
# By the layout of the weights' file, see `backbones/layouts.py`, where it tells a self-supervised method.
RECIPE_OF_LAYOUT: dict[str, RecipeName] = {
    "MoCo": "moco-v2",
    "PixPro": "pixpro",
    "PixPro, SoCo or like them": "pixpro",
    "SwAV": "swav",
    "SimMIM": "simmim",
    **dict.fromkeys(("BYOL", "DenseCL", "DINO", "lightly", "SimSiam", "SlotCon", "SoCo"), SELF_SUPERVISED),
    "SoCo's momentum network": SELF_SUPERVISED,
}


def _self_supervised(recipe: Recipe) -> Recipe:
    return replace(recipe, norms_in_heads=True)


def _moco(recipe: Recipe) -> Recipe:
    finetune = Rates(0.02, 5e-6, "R-CNN recipe for MoCo v2 and PixPro, after pre-training")
    return replace(recipe, finetune=finetune, norms_in_heads=True)


def _swav(recipe: Recipe) -> Recipe:
    finetune = Rates(0.03, 5e-6, "R-CNN recipe for SwAV, after pre-training", warmup_steps=1000)
    return replace(recipe, finetune=finetune, norms_in_heads=True)


def _swin(recipe: Recipe) -> Recipe:
    # The paper's rates; the released Swin-B run was fine-tuned with a weight decay of 1e-2.
    plain = Rates(1e-4, 5e-2, "Swin recipe", optimizer="adamw", decays_norms=False)
    return replace(
        recipe,
        pretrain=replace(plain, origin="Swin pre-training recipe"),
        finetune=replace(plain, weight_decay=2e-2, origin="Swin recipe after pre-training"),
        plain=plain,
        trains_whole_backbone=True,  # as mmdetection's Swin configs
    )


def _simmim(recipe: Recipe) -> Recipe:
    swin = _swin(recipe)
    plain = replace(swin.plain, lr=6e-5, origin="SimMIM recipe", batch_size=32, schedule="3x")
    finetune = replace(plain, lr=9e-5, weight_decay=2.5e-3, origin="SimMIM recipe after pre-training")
    return replace(swin, plain=plain, finetune=finetune, policy="lsj")


# What each makes of the recipe of a family, and the families it is for.
_VARIANTS: dict[RecipeName, tuple[Callable[[Recipe], Recipe], tuple[str, ...]]] = {
    "self-supervised": (_self_supervised, RCNN),
    "moco-v2": (_moco, RCNN),
    "pixpro": (_moco, RCNN),
    "swav": (_swav, RCNN),
    "swin": (_swin, ("fcos", "retinanet", *RCNN)),
    "simmim": (_simmim, RCNN),
}


def recipe_for(
    detector: DetectorConfig, backbone: BackboneConfig, layout: str | None, *, asked: RecipeName | None = None
) -> Recipe:
    """The recipe that was asked for, else the one that fits.

    Args:
        layout: of the file with the backbone's weights, by name; None where there is none.
        asked: its name; None chooses by family, backbone and layout.

    Raises:
        ConfigError: asked for one that the family does not have.
    """
    name = asked or _fitting(detector.family, backbone, layout)
    if name == "default":
        return detector.RECIPE
    change, families = _VARIANTS[name]
    if detector.family not in families:
        raise ConfigError(f"--recipe {name}: is for {', '.join(families)}, not for {detector.family}; use default")
    return replace(change(detector.RECIPE), name=name)


def layout_of(backbone: BackboneConfig) -> str | None:
    """The layout of the weights of a backbone, where its settings name a file.

    Raises:
        WeightsError: a file that cannot be read.
    """
    file = Path(backbone.weights)
    return read_backbone(file).layout if file.is_file() else None


def _fitting(family: str, backbone: BackboneConfig, layout: str | None) -> RecipeName:
    name: RecipeName = RECIPE_OF_LAYOUT.get(layout or "", "default")
    if backbone.family != "resnet" and name != "simmim":
        name = "default"
    if backbone.family == "swin" and (name == "default" or family not in RCNN):
        name = "swin"
    return name if name != "default" and family in _VARIANTS[name][1] else "default"
