"""Weights that torchvision offers for a backbone, by name."""

import re
from pathlib import Path
from urllib.parse import urlparse

import torch
from torchvision.models import WeightsEnum, get_model_weights, get_weight, list_models

from aligndet_cli.backbones.build import single_name
from aligndet_cli.errors import WeightsError


def torchvision_weights(backbone_name: str) -> dict[str, WeightsEnum]:
    """Return torchvision's weights of a backbone by name; empty for a size that torchvision lacks."""
    name = single_name(backbone_name)
    return dict(get_model_weights(name).__members__) if name in list_models() else {}


def named_weights(weights: str, backbone_name: str) -> WeightsEnum:
    """Return the weights of a name, such as `DEFAULT` or `ResNet50_Weights.IMAGENET1K_V2`.

    Raises:
        WeightsError: torchvision has no such weights for this backbone.
    """
    known = torchvision_weights(backbone_name)
    choices = "".join(f"{name}, " for name in known)
    try:
        member: WeightsEnum = get_weight(weights) if "." in weights else known[weights]
    except (KeyError, ValueError):
        raise WeightsError(
            f"backbone weights '{weights}': neither a file nor weights of {backbone_name}; "
            f"known: none, workspace, {choices}or the path of a weights file"
        ) from None
    if member not in known.values():
        has = f"which has: {choices.removesuffix(', ')}" if known else "for which torchvision has none"
        raise WeightsError(f"backbone weights '{weights}': not for {backbone_name}, {has}")
    return member


def cached_or_downloaded(weights: WeightsEnum, *, offline: bool) -> Path:
    """Return the file of weights in torch's cache; download it if it is not there.

    Raises:
        WeightsError: the file is not there and `offline` is set, or cannot be downloaded.
    """
    file_name = Path(urlparse(weights.url).path).name
    file = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if file.is_file():
        return file
    if offline:
        raise WeightsError(
            f"backbone weights '{weights}': not in the cache and --offline is set; put {file_name} at {file}"
        )
    # torchvision's file names end in the first digits of the SHA-256 of their content.
    hash_match = re.search(r"-([0-9a-f]{8,})\.", file_name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            weights.url, str(file), hash_prefix=hash_match.group(1) if hash_match else None, progress=False
        )
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise WeightsError(
            f"backbone weights '{weights}': download failed ({reason}); put {file_name} at {file}"
        ) from None
    return file
