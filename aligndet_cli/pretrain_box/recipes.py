"""Settings and rates of each method of `pretrain-box`, where they differ from AlignDet's."""

from dataclasses import replace
from typing import Any, Literal, get_args

from aligndet_cli.training.recipe import ProjectorRecipe, Rates, Recipe, RecipeName

MethodName = Literal["aligndet", "classes", "detreg", "up-detr", "soco"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
# Of UP-DETR's and DETReg's `selfdet.py`: short sides 320 to 480 in steps of 16, without 384.
_SMALL_VIEWS = {"short_side": (320, 336, 352, 368, 400, 416, 432, 448, 464, 480), "long_side": 600}
# Defaults of settings that a method has of its own, by name of the setting.
DEFAULTS: dict[MethodName, dict[str, Any]] = {
    "aligndet": {},
    "classes": {},
    "detreg": {"views": _SMALL_VIEWS},
    "up-detr": {"views": _SMALL_VIEWS},
    "soco": {"views": {"short_side": (224,)}, "momentum": 0.99, "freeze_backbone": False},
}
HEAD_NORMS: dict[MethodName, Literal["batch"]] = {"soco": "batch"}  # of R-CNNs, unless one is asked for
NECK_NORMS: dict[MethodName, Literal["batch"]] = {"soco": "batch"}  # unless one is asked for; of the others none
# Recipes of fine-tuning that the authors of a method have published, for ResNets: SoCo's detectron2_configs/ and
# UP-DETR's README. AptDet's and DETReg's are the detector's own.
RECIPES_AFTER: dict[MethodName, RecipeName] = {"soco": "soco", "up-detr": "up-detr"}
ALL_PROPOSALS = 100_000  # best of an image: more than there are
SOCO_PROJECTOR = ProjectorRecipe(hidden_dim=4096, start="torch")
_DETR = Rates(
    lr=1e-4,
    weight_decay=1e-4,
    origin="UP-DETR",
    batch_size=256,
    optimizer="adamw",
    schedule="50e",  # theirs is 60, which has no name here: --epochs 60
    drops=(("50e", (40 / 60,)),),
    warmup="none",
    clip_norm=0.1,
)
_DETREG = replace(_DETR, origin="DETReg", batch_size=192, drops=(("50e", ()),))
_SOCO = Rates(
    lr=1.0,
    weight_decay=1e-5,
    origin="SoCo",
    batch_size=256,
    optimizer="lars",
    schedule="100e",
    warmup_steps=6255,  # ten epochs of ImageNet in batches of 2,048
    decay="cosine",
)


def recipe_of_method(recipe: Recipe, method: MethodName) -> Recipe:
    """Return a detector's recipe with the method's own rates and number of proposals in pre-training.

    Source: `classes`: AptDet trains on clusters as on labels. The others: dddzg/up-detr `main.py`, amirbar/DETReg
        `configs/` and its 30 proposals an image, hologerry/SoCo `tools/`, which draws from all proposals.
    """
    if method == "classes":
        return replace(recipe, pretrain=recipe.plain)
    if method == "detreg":
        return replace(recipe, pretrain=_DETREG, topk=30)
    if method == "up-detr":
        return replace(recipe, pretrain=_DETR)
    if method == "soco":
        return replace(recipe, pretrain=_SOCO, topk=ALL_PROPOSALS, projector=SOCO_PROJECTOR)
    return recipe
