"""The backbone of a study and a file of its weights: as asked for, else what this machine has already."""

from pathlib import Path

import torch

from aligndet_cli.backbones import FAMILIES, BackboneConfig, find_backbone_weights, torchvision_weights
from aligndet_cli.backbones.build import WEIGHTS_FILE
from aligndet_cli.backbones.weights import locate_backbone_weights, read_backbone
from aligndet_cli.config import NO_WEIGHTS, validated
from aligndet_cli.errors import WeightsError
from aligndet_cli.workspace import Workspace

# Backbones to look for in torch's cache where none is named: on a CPU the lightest first, on a GPU the paper's.
_ON_CPU = ("mobilenet_v2", "resnet18", "resnet34", "resnet50")
_ON_GPU = ("resnet50", "resnet34", "resnet18", "mobilenet_v2")


def find_backbone(
    name: str | None, weights: str | None, workspace: Workspace, *, offline: bool, is_gpu: bool
) -> tuple[str, Path]:
    """Return the name of a backbone and the file of its weights.

    Args:
        name: None: the one that the weights are of.
        weights: as in the setting `backbone.weights`; None: torchvision's if they are in torch's cache.

    Raises:
        ConfigError: no such backbone.
        WeightsError: no weights, or weights that do not fit.
    """
    if name is not None:
        validated(BackboneConfig, {"name": name}, {"name": "--backbone"})
    if weights is None:
        return _in_cache([name] if name is not None else list(_ON_GPU if is_gpu else _ON_CPU))
    if name is None:
        name = _backbone_of(weights) if WEIGHTS_FILE.is_file(weights) else (_ON_GPU if is_gpu else _ON_CPU)[0]
    config = BackboneConfig.model_validate({"name": name, "weights": weights})
    file = find_backbone_weights(config, workspace, offline=offline).file
    if file is None:
        raise WeightsError(
            f"--backbone-weights {weights}: random weights; the method needs a backbone that has learned from images: "
            "give DEFAULT (torchvision's) or FILE"
        )
    return name, file.absolute()


def _in_cache(names: list[str]) -> tuple[str, Path]:
    for name in names:
        for weights in reversed(torchvision_weights(name)):  # the newest first
            try:
                file = locate_backbone_weights(weights, name, offline=True)
            except WeightsError:
                continue
            if file is not None:
                return name, file.absolute()
    place = Path(torch.hub.get_dir()) / "checkpoints"
    raise WeightsError(
        f"{place}: no weights of {', '.join(names)}: give --backbone-weights FILE (of one that "
        "`aligndet ls backbones` lists, in any published layout), or DEFAULT, which downloads torchvision's"
    )


def _backbone_of(weights: str) -> str:
    """Return the backbone that a file of weights fits."""
    file = Path(weights)
    if not file.is_file():
        raise WeightsError(f"--backbone-weights {weights}: no such file")
    family = read_backbone(file).family
    reasons = []
    for name in (name for name, its in FAMILIES.items() if its == family):
        config = BackboneConfig.model_validate({"name": name, "weights": weights})
        try:
            find_backbone_weights(config, Workspace(Path(NO_WEIGHTS)), offline=True)
        except WeightsError as error:
            reasons.append(str(error))
        else:
            return name
    raise WeightsError(reasons[0])
