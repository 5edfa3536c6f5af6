"""Detector families, one file each. A new family is one more class in the union `AnyConfig`."""

from typing import Annotated, Any, TypeAlias, get_args

from pydantic import BeforeValidator, Field

from aligndet_cli.detectors.cascade_rcnn import CascadeMaskRCNNConfig, CascadeRCNNConfig
from aligndet_cli.detectors.detr import DETRConfig
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.detectors.htc import HTCConfig
from aligndet_cli.detectors.interface import Detector
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.detectors.parts.fpn import NormName
from aligndet_cli.detectors.retinanet import RetinaNetConfig

AnyConfig: TypeAlias = (
    RetinaNetConfig
    | FCOSConfig
    | FasterRCNNConfig
    | MaskRCNNConfig
    | CascadeRCNNConfig
    | CascadeMaskRCNNConfig
    | HTCConfig
    | DETRConfig
)
DETECTORS: tuple[str, ...] = tuple(config.model_fields["family"].default for config in get_args(AnyConfig))
DEFAULT_FAMILY = "retinanet"


def _name_family(settings: Any) -> Any:
    """Add the default family where none is named, so that users can set fields without naming it."""
    return {"family": DEFAULT_FAMILY, **settings} if isinstance(settings, dict) else settings


DetectorConfig: TypeAlias = Annotated[AnyConfig, Field(discriminator="family"), BeforeValidator(_name_family)]


def neck_norm_of(config: DetectorConfig) -> str | None:
    """Return the norm of the detector's neck, possibly "auto"; None for families whose neck takes none."""
    norm: str | None = config.model_dump().get("neck_norm")
    return norm


def semantic_classes_of(config: DetectorConfig) -> int:
    """Return the number of classes of pixels that the detector trains on; 0 without a semantic branch."""
    return config.semantic_classes if isinstance(config, HTCConfig) else 0


def settle_neck_norm(config: DetectorConfig, norm: NormName) -> DetectorConfig:
    """Return the config with `norm` in place of "auto"."""
    return config.model_copy(update={"neck_norm": norm}) if neck_norm_of(config) == "auto" else config


def with_head_norm(config: DetectorConfig, norm: NormName) -> DetectorConfig:
    """Return the config with `norm` in the heads if the family allows one there and the config has "none"."""
    has_place = config.model_dump().get("head_norm") == "none"
    return config.model_copy(update={"head_norm": norm}) if has_place else config


__all__ = [
    "DEFAULT_FAMILY",
    "DETECTORS",
    "Detector",
    "DetectorConfig",
    "neck_norm_of",
    "semantic_classes_of",
    "settle_neck_norm",
    "with_head_norm",
]
