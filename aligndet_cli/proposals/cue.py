"""A backbone as a cue for the order of a search's boxes. Free of torch at import."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aligndet_cli.config import validated
from aligndet_cli.errors import ConfigError
from aligndet_cli.workspace import Workspace

if TYPE_CHECKING:
    from aligndet_cli.backbones import BackboneConfig

CUE_INPUT = "backbone"  # among the inputs of the manifest


@dataclass(frozen=True)
class Cue:
    """A backbone whose features order boxes.

    Attributes:
        name: of the network.
        weights: their file.
        content_hash: of the weights.
        origin: one line for people.
    """

    name: str
    weights: Path
    content_hash: str
    origin: str


def plan_cue(name: str, weights: str, workspace: Workspace, *, offline: bool) -> Cue:
    """Find the weights of a backbone.

    Args:
        weights: as `backbone.weights` of other stages.

    Raises:
        ConfigError: no such backbone, or its weights are random.
        WeightsError: the weights cannot be read, or are another network's.
    """
    from aligndet_cli.backbones import find_backbone_weights

    config = _config_of(name, weights)
    found = find_backbone_weights(config, workspace, offline=offline)
    if found.file is None:
        raise ConfigError(
            f"--backbone {name}: the order of its features means nothing without trained weights: give "
            "--backbone-weights a file or DEFAULT, or run `aligndet pretrain-image` first"
        )
    return Cue(name, found.file, found.content_hash, found.origin)


def check_cue(name: str, weights: str, workspace: Workspace, *, offline: bool) -> None:
    """Make sure that `plan_cue` will find its weights, without downloading them; arguments and errors as there."""
    from aligndet_cli.backbones.checks import check_weights, is_by_name

    config = _config_of(name, weights)
    if is_by_name(weights):
        check_weights(config, workspace, offline=offline)
    else:
        plan_cue(name, weights, workspace, offline=offline)


def _config_of(name: str, weights: str) -> "BackboneConfig":
    from aligndet_cli.backbones import BackboneConfig
    from aligndet_cli.backbones.build import require_single

    origins = {"name": "--backbone", "weights": "--backbone-weights"}
    config = validated(BackboneConfig, {"name": name, "weights": weights}, origins)
    require_single(name, "proposals")
    return config
