"""Backbones: a name becomes a module that returns feature maps by level."""

from typing import Annotated, Literal

from pydantic import Field

from aligndet_cli.backbones.resnet import ResNet, build_resnet
from aligndet_cli.backbones.weights import (
    RANDOM_WEIGHTS,
    BackboneWeights,
    find_backbone_weights,
    load_backbone_weights,
    weights_of,
)
from aligndet_cli.config import Frozen

Backbone = ResNet  # grows into a union when the next family arrives

BUILDERS = {name: build_resnet for name in ("resnet18", "resnet34", "resnet50", "resnet101")}


class BackboneConfig(Frozen):
    """Which backbone, where its weights come from, and what of it stays fixed while training."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    # "none", a torchvision name (`DEFAULT`, `IMAGENET1K_V2`, `ResNet50_Weights.IMAGENET1K_V1`), a .pth/.pt file, or
    # "workspace": the newest `pretrain-image` run of this backbone. "auto": that if there is one, else none.
    weights: str = "auto"
    # -1 nothing, 0 the stem, 1..4 the stem and that many stages. "auto": the stage decides (FACTS §5).
    frozen_stages: Annotated[int, Field(ge=-1, le=4)] | Literal["auto"] = "auto"
    # Batch norm layers keep their running statistics while training. "auto": the stage decides (FACTS §5).
    norm_eval: bool | Literal["auto"] = "auto"


def build_backbone(config: BackboneConfig) -> Backbone:
    """The named backbone with fresh weights, frozen as the config says; "auto" freezes nothing.

    Weights are not read here: `find_backbone_weights` and `load_backbone_weights` do that, because a detector that is
    about to be filled from a checkpoint does not need them.
    """
    backbone = BUILDERS[config.name](config.name)
    frozen_stages = -1 if config.frozen_stages == "auto" else config.frozen_stages
    norm_eval = False if config.norm_eval == "auto" else config.norm_eval
    backbone.freeze(frozen_stages, norm_eval=norm_eval)
    return backbone


__all__ = [
    "BUILDERS",
    "RANDOM_WEIGHTS",
    "Backbone",
    "BackboneConfig",
    "BackboneWeights",
    "build_backbone",
    "find_backbone_weights",
    "load_backbone_weights",
    "weights_of",
]
