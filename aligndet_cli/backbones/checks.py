"""Checks of a backbone's weights and settings before anything is made or downloaded."""

from aligndet_cli.backbones.build import WEIGHTS_FILE, BackboneConfig
from aligndet_cli.backbones.weights import find_backbone_weights, require_trained, training_shown_by
from aligndet_cli.config import NO_WEIGHTS, WORKSPACE_WEIGHTS
from aligndet_cli.errors import ConfigError
from aligndet_cli.workspace import Workspace


def is_by_name(weights: str) -> bool:
    """Return True for weights that may have to be downloaded."""
    return weights not in (*WORKSPACE_WEIGHTS, NO_WEIGHTS) and not WEIGHTS_FILE.is_file(weights)


def check_weights(
    config: BackboneConfig, workspace: Workspace, *, offline: bool, trained_for: str | None = None
) -> None:
    """Make sure that a backbone's weights can be found; of those that may be downloaded only the name is checked.

    Args:
        trained_for: stage that needs trained weights; None: it does not.

    Raises:
        ConfigError: no such network of timm.
        WeightsError: no such weights, or others than the stage needs.
    """
    if is_by_name(config.weights) and not offline:
        training_shown_by(config.weights, config.name)
        return
    found = find_backbone_weights(config, workspace, offline=offline)
    if trained_for is not None:
        require_trained(found, config, trained_for)


def refuse_idle(config: BackboneConfig, layer_decay: float | None, way_out: str) -> None:
    """Refuse settings that change nothing in a backbone that is frozen as a whole.

    Raises:
        ConfigError: there is one; the message ends with `way_out`.
    """
    is_given = {
        "backbone.recompute": config.recompute,
        "backbone.drop_path": config.drop_path != "auto",
        "training.layer_decay": layer_decay is not None,
    }
    for name, given in is_given.items():
        if given:
            raise ConfigError(f"{name}: no effect on a frozen backbone; leave it out, or {way_out}")
