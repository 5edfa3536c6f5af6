"""Detector families, one file each. A new family is one more line in `BUILDERS` and one in `DetectorConfig`."""

from typing import TypeAlias

from aligndet_cli.backbones import Backbone
from aligndet_cli.detectors.retinanet import RetinaNet, RetinaNetConfig, build_retinanet

# The second family makes this `Annotated[RetinaNetConfig | FCOSConfig, Field(discriminator="family")]`.
DetectorConfig: TypeAlias = RetinaNetConfig
AnyDetector: TypeAlias = RetinaNet

BUILDERS = {"retinanet": build_retinanet}


def build_detector(config: DetectorConfig, backbone: Backbone, num_classes: int) -> AnyDetector:
    """The configured detector on `backbone`, which it shares and does not copy; the rest has fresh weights."""
    return BUILDERS[config.family](config, backbone, num_classes)


__all__ = ["BUILDERS", "AnyDetector", "DetectorConfig", "build_detector"]
