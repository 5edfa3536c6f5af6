"""A frozen network that another one learns from: a file, or one of timm by name."""

from dataclasses import dataclass
from pathlib import Path

from aligndet_cli.backbones.build import WEIGHTS_FILE, BackboneConfig, build_backbone, require_single
from aligndet_cli.backbones.from_timm import is_of_timm
from aligndet_cli.backbones.interface import Backbone
from aligndet_cli.backbones.timm_weights import WEIGHTS as TIMM_WEIGHTS
from aligndet_cli.backbones.weights import BackboneWeights, find_backbone_weights, load_backbone_weights, network_of
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.workspace import Workspace


@dataclass(frozen=True)
class Teacher:
    """A network with its weights.

    Attributes:
        name: as in `BackboneConfig`.
    """

    name: str
    weights: BackboneWeights

    def build(self) -> Backbone:
        """Build the network, frozen. It changes its images to its own mean and deviation by itself."""
        backbone = build_backbone(BackboneConfig.model_validate({"name": self.name}))
        load_backbone_weights(backbone, self.weights.file)
        return backbone.requires_grad_(False).eval()


def find_teacher(teacher: str, workspace: Workspace, *, offline: bool) -> Teacher:
    """Return the network in a file, or `timm:NAME` with the weights that timm names for it.

    Args:
        offline: never download.

    Raises:
        ConfigError: neither of the two, or no such network.
        WeightsError: the file cannot be read or does not tell its network, or weights must not be downloaded.
    """
    try:
        if is_of_timm(teacher):
            name, weights = teacher, TIMM_WEIGHTS
        elif WEIGHTS_FILE.is_file(teacher):
            name, weights = network_of(Path(teacher)), teacher
        else:
            raise ConfigError("neither a file nor timm:NAME")
        require_single(name, "as a teacher")
        config = BackboneConfig.model_validate({"name": name, "weights": weights})
        return Teacher(name, find_backbone_weights(config, workspace, offline=offline))
    except (ConfigError, WeightsError) as error:  # its messages are about a backbone
        reason = str(error).removeprefix(f"backbone weights {teacher}: ").removeprefix(f"--backbone {teacher}: ")
        raise type(error)(f"--teacher {teacher}: {reason}") from None
