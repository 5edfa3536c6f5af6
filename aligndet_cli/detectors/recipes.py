"""Choose the training recipe of a detector by its family, its backbone, the backbone's weights, and the data.

Source: tables 3 to 6 of the paper, the authors' configs (named below) and the names of their released runs, which hold
learning rate and weight decay.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from aligndet_cli.backbones import COMPOSITES, BackboneConfig, Family, MethodName, WeightsTraining
from aligndet_cli.backbones.from_timm import facts_of
from aligndet_cli.backbones.vit import nearest_size
from aligndet_cli.backbones.weights import training_shown_by
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.training.recipe import (
    CBNET_SIDES,
    WARMUP_STEPS,
    WIDE_SIDES,
    Freezing,
    Rates,
    Recipe,
    RecipeName,
    ScheduleName,
)

# Families with the same pre-training: it leaves masks alone, as in the authors' Faster R-CNN.
ALIKE = (("faster-rcnn", "mask-rcnn"), ("cascade-rcnn", "cascade-mask-rcnn", "htc"))
RCNN = tuple(family for families in ALIKE for family in families)
CASCADES = ALIKE[1]
SELF_SUPERVISED: RecipeName = "self-supervised"
# Recipe and short name of weights by the layout of their file (see `backbones/layouts.py`), if that reveals the method.
METHODS: dict[str, tuple[RecipeName, str]] = {
    "MoCo": ("moco-v2", "moco"),
    "PixPro": ("pixpro", "pixpro"),
    "PixPro, SoCo or like them": ("pixpro", "pixpro or soco"),
    "SwAV": ("swav", "swav"),
    "SimMIM": ("simmim", "simmim"),
    "SoCo": (SELF_SUPERVISED, "soco"),
    "SoCo's momentum network": (SELF_SUPERVISED, "soco"),
    "DenseCL": (SELF_SUPERVISED, "densecl"),
    "SlotCon": (SELF_SUPERVISED, "slotcon"),
    "self-supervised": (SELF_SUPERVISED, "other"),  # by `backbone.method`
    **{name: (SELF_SUPERVISED, name.lower()) for name in ("BYOL", "DINO", "lightly", "SimSiam")},
}
VOC_SCHEDULE: ScheduleName = "12k"  # voc/*_12k_voc0712.py
VOC_DETR_SCHEDULE: ScheduleName = "100e"  # voc/detr_mstrain_100e_voc0712.py
# Layouts that do not reveal the method; without an ImageNet classifier the weights count as self-supervised.
PLAIN_LAYOUTS = ("torchvision", "timm")
# Number of images of COCO's train2017: all, and those with a label. The authors' low-data configs of DETR round an
# epoch of it up to 7,500 steps of 16 images.
COCO_IMAGES = (118_287, 117_266)
COCO_IMAGES_ROUNDED = 120_000


def _self_supervised(recipe: Recipe) -> Recipe:
    return replace(recipe, norms_in_heads=True)  # coco/mask_rcnn_r50_fpn_mstrain_1x_coco.py


def _moco(recipe: Recipe) -> Recipe:
    finetune = Rates(0.02, 5e-6, "R-CNN recipe for MoCo v2 and PixPro, after pre-training")
    return replace(recipe, finetune=finetune, norms_in_heads=True)


def _swav(recipe: Recipe) -> Recipe:
    finetune = Rates(0.03, 5e-6, "R-CNN recipe for SwAV, after pre-training", warmup_steps=1000)
    return replace(recipe, finetune=finetune, norms_in_heads=True)


def _soco(recipe: Recipe) -> Recipe:
    """Change a recipe for a detector that SoCo pre-trained.

    Source: its detectron2_configs/SoCo_FPN_400ep.yaml, on detectron2's Base-RCNN-FPN.yaml.
    """
    finetune = replace(
        recipe.plain, weight_decay=2.5e-5, origin="SoCo recipe", warmup_steps=1000, drops=(("90k", (60 / 90, 80 / 90)),)
    )
    return replace(recipe, finetune=finetune, norms_in_heads=True)


def _up_detr(recipe: Recipe) -> Recipe:
    """Change a recipe for a DETR that UP-DETR pre-trained.

    Source: the README of dddzg/up-detr, and its `models/backbone.py`, which also fixes scale and shift of the norms.
    """
    finetune = replace(recipe.finetune, origin="UP-DETR recipe", backbone_lr_scale=0.5)
    return replace(recipe, finetune=finetune, freezing=Freezing(1, norm_eval=True))


def _swin(recipe: Recipe) -> Recipe:
    """Change a recipe for Swin.

    Source: other_backbones/finetune/mask_rcnn_swin-s-p4-w7_fpn_ms-crop_1x_coco.py and _3x_; the paper's weight decay
    after pre-training (its released Swin-B run had 1e-2).
    """
    plain = Rates(
        1e-4,
        5e-2,
        "Swin recipe",
        optimizer="adamw",
        warmup_steps=1000,
        drops=(("3x", (27 / 36, 33 / 36)),),
        decays_norms=False,
    )
    return replace(
        recipe,
        pretrain=replace(plain, origin="Swin pre-training recipe"),
        finetune=replace(plain, weight_decay=2e-2, origin="Swin recipe after pre-training"),
        plain=plain,
        freezing=Freezing(-1, norm_eval=False),
        policy="detr",
    )


def _cbnet(recipe: Recipe) -> Recipe:
    """Change a recipe for CBNet v2 of Swins.

    Source: selfsup/cbv2.py and coco/cbnetv2_swin-L_8x2_1x_coco.py, whose neck has no norm; the name of the released run
    after pre-training, whose batch is of 128 images. Its long sides and views are settings (examples/table03.sh).
    """
    swin = _swin(recipe)
    plain = replace(swin.plain, origin="CBNet recipe", warmup_steps=WARMUP_STEPS, drops=())
    finetune = replace(plain, lr=8e-4, weight_decay=2.5e-3, batch_size=128, origin="CBNet recipe after pre-training")
    return replace(
        swin,
        pretrain=replace(plain, origin="CBNet pre-training recipe"),
        finetune=finetune,
        plain=plain,
        policy="resize",
        short_sides=CBNET_SIDES,
        neck_norm="none",
    )


def _convnext(recipe: Recipe) -> Recipe:
    """Change a recipe for ConvNeXt, whose authors train detectors as Swin's do, and decay no biases.

    Source: their mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_adamw_3x_coco_in1k.py. How its rate falls
    towards the stem depends on detector and size: `_falling_rates`.
    """
    swin = _swin(recipe)
    pretrain, finetune, plain = (
        replace(rates, origin=rates.origin.replace("Swin", "ConvNeXt"), bias_decay_scale=0.0)
        for rates in (swin.pretrain, swin.finetune, swin.plain)
    )
    return replace(swin, pretrain=pretrain, finetune=finetune, plain=plain)


def _vit(recipe: Recipe) -> Recipe:
    """Change a recipe for a plain ViT.

    Source: ViTDet's appendix A.2: AdamW, 1e-4, 0.1. Its rate falls from block to block towards the patches:
    `_falling_rates`. Its images are cut from larger ones; ours are as for ConvNeXt. After pre-training, decay falls as
    much as Swin's.
    """
    convnext = _convnext(recipe)
    pretrain, finetune, plain = (
        replace(rates, origin=rates.origin.replace("ConvNeXt", "ViT"), weight_decay=2 * rates.weight_decay)
        for rates in (convnext.pretrain, convnext.finetune, convnext.plain)
    )
    return replace(convnext, pretrain=pretrain, finetune=finetune, plain=plain)


def _simmim(recipe: Recipe) -> Recipe:
    """Change a recipe for SimMIM's Swin.

    Source: other_backbones/finetune/mask_rcnn_swin-b-p4-w7_fpn_lsj_3x_coco_simmim.py, whose rate drops at 24 and 33;
    other_backbones/selfsup/selfsup_mask-rcnn_swin-b_simmim.py; the released run's rate and decay after pre-training.
    """
    swin = _swin(recipe)
    plain = replace(swin.plain, lr=6e-5, origin="SimMIM recipe", batch_size=32, schedule="3x", drops=())
    return replace(
        swin,
        pretrain=replace(swin.pretrain, lr=6e-5, origin="SimMIM pre-training recipe", batch_size=32),
        finetune=replace(plain, lr=9e-5, weight_decay=2.5e-3, origin="SimMIM recipe after pre-training"),
        plain=plain,
        policy="lsj",
    )


# Learning rate and layer decay of the ConvNeXt authors' cascades; their Mask R-CNN, of a tiny one alone, has another.
# Source: their cascade_mask_rcnn_convnext_*_mstrain_480-800_giou_4conv1f_adamw_3x_coco_in1k.py; from large on in22k.
_CONVNEXT_CASCADES = {
    "tiny": (2e-4, 0.7),
    "small": (2e-4, 0.7),
    "base": (2e-4, 0.8),
    "large": (1e-4, 0.7),
    "xlarge": (1e-4, 0.7),
}
_CONVNEXT_DECAY = 0.95
# Layer decay of ViTDet's B, L and H by their number of blocks. Source: detectron2's projects/ViTDet/configs/COCO.
_VIT_DECAYS = {12: 0.7, 24: 0.8, 32: 0.9}


def _falling_rates(recipe: Recipe, family: str, backbone: BackboneConfig) -> Recipe:
    """Let the rate of a ConvNeXt or a plain ViT fall towards its start, as far as a source says so."""
    changes: dict[str, float] = {}
    if recipe.name == "vit" and _family(backbone) == "vit":
        changes["layer_decay"] = nearest_size(_VIT_DECAYS, facts_of(backbone.name).num_blocks)
    if recipe.name == "convnext" and _is_convnext(backbone):
        size = re.sub(r"^(timm:)?convnext_|\..*$", "", backbone.name)
        if family in ALIKE[1] and size in _CONVNEXT_CASCADES:
            changes["lr"], changes["layer_decay"] = _CONVNEXT_CASCADES[size]
        else:
            changes["layer_decay"] = _CONVNEXT_DECAY
    pretrain, finetune, plain = (
        replace(rates, **changes)  # type: ignore[arg-type]
        for rates in (recipe.pretrain, recipe.finetune, recipe.plain)
    )
    return replace(recipe, pretrain=pretrain, finetune=finetune, plain=plain)


def _is_convnext(backbone: BackboneConfig) -> bool:
    return backbone.family == "convnext" or (backbone.family == "timm" and facts_of(backbone.name).kind == "convnext")


# By name of the recipe: a function that changes the recipe of a family, and the families it is for.
_VARIANTS: dict[RecipeName, tuple[Callable[[Recipe], Recipe], tuple[str, ...]]] = {
    "self-supervised": (_self_supervised, RCNN),
    "moco-v2": (_moco, RCNN),
    "pixpro": (_moco, RCNN),
    "swav": (_swav, RCNN),
    "soco": (_soco, RCNN),
    "up-detr": (_up_detr, ("detr",)),
    "swin": (_swin, ("fcos", "retinanet", *RCNN)),
    "cbnet": (_cbnet, ("fcos", "retinanet", *RCNN)),
    "simmim": (_simmim, RCNN),
    "convnext": (_convnext, ("fcos", "retinanet", *RCNN)),
    "vit": (_vit, ("fcos", "retinanet", *RCNN)),
}
_OF_BACKBONE: dict[Family, RecipeName] = {"swin": "swin", "convnext": "convnext", "vit": "vit"}


def recipe_for(
    detector: DetectorConfig, backbone: BackboneConfig, training: WeightsTraining, *, asked: RecipeName | None = None
) -> Recipe:
    """Return the recipe named `asked`; None: the one for this family, backbone and its weights' training.

    Raises:
        ConfigError: the family has no recipe of that name.
    """
    name = asked or _fitting(detector.family, backbone, training)
    recipe = detector.RECIPE
    if _family(backbone) in ("mobilenet", "efficientnet", "efficientnet-lite") and recipe.freezing is None:
        # other_backbones/finetune/mask_rcnn_mbv2_fpn_1x_coco.py: mmdetection's MobileNetV2 freezes nothing; so does its
        # RetinaNet on EfficientNet
        recipe = replace(recipe, freezing=Freezing(-1, norm_eval=False))
    if name == "default":
        return recipe
    change, families = _VARIANTS[name]
    if detector.family not in families:
        raise ConfigError(f"--recipe {name}: is for {', '.join(families)}, not for {detector.family}; use default")
    return _falling_rates(replace(change(recipe), name=name), detector.family, backbone)


@dataclass(frozen=True)
class LabelFacts:
    """Properties of the labels that the recipe of fine-tuning depends on."""

    is_voc: bool = False  # Pascal VOC's twenty classes
    is_fraction: bool = False  # only a part of the images is used


def fit_to_labels(recipe: Recipe, family: str, labels: LabelFacts) -> Recipe:
    """Adapt the recipe to fine-tuning on Pascal VOC, or on a part of the labelled images.

    Source: the authors' configs in voc/ and semi-coco/.
    """
    is_voc, is_fraction = labels.is_voc, labels.is_fraction
    changes: dict[str, object] = {}
    if is_fraction and family == "fcos":
        changes |= {"warmup": "constant", "clip_norm": None}
    if is_fraction and family == "detr":
        changes |= {"warmup": "linear"}
        recipe = replace(recipe, counts_whole_set=True)
    if is_voc and family == "detr":
        changes |= {"schedule": VOC_DETR_SCHEDULE, "drops": ((VOC_DETR_SCHEDULE, (70 / 100,)),), "clip_norm": None}
        recipe = replace(recipe, policy="resize", freezing=Freezing(1, norm_eval=True))
    elif is_voc:
        changes |= {"schedule": VOC_SCHEDULE}
    finetune, plain = (replace(rates, **changes) for rates in (recipe.finetune, recipe.plain))  # type: ignore[arg-type]
    return replace(recipe, finetune=finetune, plain=plain, short_sides=WIDE_SIDES if is_voc else recipe.short_sides)


def images_of_an_epoch(recipe: Recipe, num_chosen: int, num_all: int) -> int:
    """Return the number of images in an epoch of fine-tuning on `num_chosen` images from a set of `num_all`.

    Source: the authors' semi-coco/detr_50e_semi-coco.py trains for 375,000 steps of 16 images on every fraction.
    """
    if not recipe.counts_whole_set:
        return num_chosen
    return COCO_IMAGES_ROUNDED if num_all in COCO_IMAGES else num_all


def training_of_backbone(backbone: BackboneConfig) -> WeightsTraining:
    """Return the training of the weights that the settings name, as far as known without a workspace.

    Raises:
        WeightsError: the weights file cannot be read.
    """
    return told_training(backbone.method) or training_shown_by(backbone.weights, backbone.name)


def told_training(method: MethodName | Literal["auto"]) -> WeightsTraining | None:
    """Return the training of weights that the setting `backbone.method` states; None if it is "auto"."""
    if method == "auto":
        return None
    if method == "supervised":
        return WeightsTraining("torchvision", is_supervised=True)
    layouts = {recipe: layout for layout, (recipe, _) in reversed(METHODS.items())}  # the first layout of each recipe
    return WeightsTraining("self-supervised" if method == "self-supervised" else layouts[method])


def weights_kind(training: WeightsTraining) -> str:
    """Return one word for the training of a backbone: `supervised`, a method, `other`, or `none` for random weights."""
    if training.is_supervised:
        return "supervised"
    if training.layout is None:
        return "none"
    return METHODS[training.layout][1] if training.layout in METHODS else "other"


def is_resnet(backbone: BackboneConfig) -> bool:
    """Return True for a backbone that follows the rules of ResNets."""
    return _family(backbone) == "resnet"


def _family(backbone: BackboneConfig) -> Family:
    """Return the family whose rules a backbone follows: one of timm is a ViT, or like another."""
    if backbone.family != "timm":
        return backbone.family
    facts = facts_of(backbone.name)
    if facts.kind == "resnet":
        return "resnet"
    if facts.is_vit:
        return "vit"
    return "convnext" if facts.has_layer_norm else "mobilenet"


def _fitting(family: str, backbone: BackboneConfig, training: WeightsTraining) -> RecipeName:
    name: RecipeName = METHODS[training.layout][0] if training.layout in METHODS else "default"
    its = _family(backbone)
    if name == "simmim" and its != "swin":
        name = SELF_SUPERVISED
    if training.layout in PLAIN_LAYOUTS and not training.is_supervised:
        name = SELF_SUPERVISED
    if its != "resnet" and name != "simmim":
        name = "default"
    if its in _OF_BACKBONE and (name == "default" or family not in RCNN):
        name = "cbnet" if its == "swin" and backbone.name in COMPOSITES else _OF_BACKBONE[its]
    return name if name != "default" and family in _VARIANTS[name][1] else "default"
