"""Backbones of mmdetection's detectors whose tensors have other names than ours: all but ResNets."""

from collections.abc import Mapping

from torch import Tensor

from aligndet_cli.backbones.layouts import NAMINGS, rename_tensors

PREFIX = "backbone."
INDEX = "relative_position_index"  # follows from the size of the windows


def rename_backbone(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename the backbone's tensors in a detector's state dict.

    Returns:
        all tensors, the backbone's under our names (unknown names stay as they are, and are refused later), and the
        reasons by name of tensors that were left out.
    """
    own = {name.removeprefix(PREFIX) for name in tensors if name.startswith(PREFIX)}
    naming = next((naming for naming in NAMINGS if naming.marker in own), None)
    if naming is None or naming.family == "resnet":
        return dict(tensors), {}
    renamed: dict[str, Tensor] = {}
    left_out = {}
    for name, tensor in tensors.items():
        found = rename_tensors(naming, {name.removeprefix(PREFIX): tensor}) if name.startswith(PREFIX) else {}
        if found:
            renamed |= {f"{PREFIX}{ours}": value for ours, value in found.items()}
        elif name.endswith(INDEX):
            left_out[name] = "computed anew"
        else:
            renamed[name] = tensor
    return renamed, left_out
