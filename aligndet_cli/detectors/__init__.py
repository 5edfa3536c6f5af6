"""Detector families, one file each. A new family is one more line in `BUILDERS` and one in `DetectorConfig`."""

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field

from aligndet_cli.backbones import Backbone
from aligndet_cli.detectors.detr import DETR, DETRConfig, build_detr
from aligndet_cli.detectors.faster_rcnn import FasterRCNN, FasterRCNNConfig, build_faster_rcnn
from aligndet_cli.detectors.fcos import FCOS, FCOSConfig, build_fcos
from aligndet_cli.detectors.mask_rcnn import MaskRCNN, MaskRCNNConfig, build_mask_rcnn
from aligndet_cli.detectors.parts.fpn import NormName
from aligndet_cli.detectors.retinanet import RetinaNet, RetinaNetConfig, build_retinanet

DEFAULT_FAMILY = "retinanet"


def _name_family(settings: Any) -> Any:
    """Add the default family where none is named, so that users can set fields without naming it."""
    return {"family": DEFAULT_FAMILY, **settings} if isinstance(settings, dict) else settings


DetectorConfig: TypeAlias = Annotated[
    RetinaNetConfig | FCOSConfig | FasterRCNNConfig | MaskRCNNConfig | DETRConfig,
    Field(discriminator="family"),
    BeforeValidator(_name_family),
]
AnyDetector: TypeAlias = RetinaNet | FCOS | FasterRCNN | MaskRCNN | DETR

BUILDERS: dict[str, Callable[..., AnyDetector]] = {
    "retinanet": build_retinanet,
    "fcos": build_fcos,
    "faster-rcnn": build_faster_rcnn,
    "mask-rcnn": build_mask_rcnn,
    "detr": build_detr,
}


def build_detector(config: DetectorConfig, backbone: Backbone, num_classes: int) -> AnyDetector:
    """Build the configured detector around `backbone` (not a copy of it); everything else has fresh weights."""
    return BUILDERS[config.family](config, backbone, num_classes)


def neck_norm_of(config: DetectorConfig) -> str | None:
    """Return the norm of the detector's neck, possibly "auto"; None for families whose neck takes none."""
    norm: str | None = config.model_dump().get("neck_norm")
    return norm


def settle_neck_norm(config: DetectorConfig, norm: NormName) -> DetectorConfig:
    """Return the config with `norm` in place of "auto"."""
    return config.model_copy(update={"neck_norm": norm}) if neck_norm_of(config) == "auto" else config


def with_head_norm(config: DetectorConfig, norm: NormName) -> DetectorConfig:
    """Return the config with `norm` in the heads if the family allows one there and the config has "none"."""
    has_place = config.model_dump().get("head_norm") == "none"
    return config.model_copy(update={"head_norm": norm}) if has_place else config


__all__ = [
    "BUILDERS",
    "DEFAULT_FAMILY",
    "AnyDetector",
    "DetectorConfig",
    "build_detector",
    "neck_norm_of",
    "settle_neck_norm",
    "with_head_norm",
]
