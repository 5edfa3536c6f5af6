"""Backbones: a name becomes a module that returns feature maps by level."""

from aligndet_cli.backbones.build import COMPOSITES, FAMILIES, BackboneConfig, MethodName, build_backbone
from aligndet_cli.backbones.composite import CompositeBackbone
from aligndet_cli.backbones.interface import ASSISTANT, Backbone, Family
from aligndet_cli.backbones.torchvision_weights import torchvision_weights
from aligndet_cli.backbones.weights import (
    RANDOM_WEIGHTS,
    BackboneWeights,
    WeightsTraining,
    find_backbone_weights,
    load_backbone_weights,
    require_trained,
    training_shown_by,
    weights_of,
)
