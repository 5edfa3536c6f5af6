"""Weights for a backbone: by torchvision name or from a file, checked key by key.

Self-supervised checkpoints hold the same ResNet under different names (FACTS §6); a layout is recognised by where
`conv1.weight` is.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights, get_weight

from aligndet_cli.backbones.resnet import ResNet
from aligndet_cli.config import WORKSPACE_WEIGHTS
from aligndet_cli.errors import WeightsError
from aligndet_cli.training.logs import logger
from aligndet_cli.workspace import Artifact, Workspace, hash_files

NO_WEIGHTS = "none"

# MoCo v2 `module.encoder_q.`, PixPro `module.encoder.`, SwAV `module.`, DenseCL / DetCo `backbone.` or `encoder_q.`
PREFIXES = ("", "module.encoder_q.", "module.encoder.", "module.backbone.", "module.", "backbone.", "encoder_q.")
NESTING_KEYS = ("state_dict", "model")
FILE_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".pkl", ".bin")
BODY_KEY = re.compile(r"(conv1|bn1|layer\d+)\.")


@dataclass(frozen=True)
class BackboneWeights:
    """Where the weights of a backbone come from.

    Attributes:
        file: None = random weights.
        content_hash: of the file, "none" without; for the manifest.
        origin: for people.
    """

    file: Path | None
    content_hash: str
    origin: str


RANDOM_WEIGHTS = BackboneWeights(None, NO_WEIGHTS, "none (random)")


def find_backbone_weights(weights: str, backbone_name: str, workspace: Workspace, *, offline: bool) -> BackboneWeights:
    """The weights that the setting `backbone.weights` means in this workspace.

    Args:
        weights: "auto", "workspace", "none", a torchvision name, or a file; see `BackboneConfig`.
        offline: never download; weights by name must be in torchvision's cache.

    Raises:
        WeightsError: "workspace", and it has none of this backbone; or see `locate_backbone_weights`.
    """
    if weights in WORKSPACE_WEIGHTS:
        return _workspace_weights(weights, backbone_name, workspace)
    file = locate_backbone_weights(weights, backbone_name, offline=offline)
    return RANDOM_WEIGHTS if file is None else BackboneWeights(file, hash_files([file]), weights)


def weights_of(artifact: Artifact) -> BackboneWeights:
    """The weights that a run of `pretrain-image` ended with."""
    return BackboneWeights(artifact.folder / "weights.pt", artifact.content_hash, f"pretrain-image/{artifact.name}")


def _workspace_weights(weights: str, backbone_name: str, workspace: Workspace) -> BackboneWeights:
    runs = workspace.artifacts("pretrain-image")
    fitting = [run for run in runs if run.config()["backbone"]["name"] == backbone_name]
    if fitting:
        if len(fitting) > 1:
            others = ", ".join(run.name for run in fitting[:-1])
            logger.info(f"backbone weights: the newest of {len(fitting)} runs, {fitting[-1].name} (not {others})")
        return weights_of(fitting[-1])
    if weights == "auto":
        return RANDOM_WEIGHTS
    there = f" (there: {', '.join(run.name for run in runs)})" if runs else ""
    raise WeightsError(
        f"{workspace.root / 'pretrain-image'}: no finished run of {backbone_name}{there}; "
        f"run `aligndet pretrain-image DATA --backbone {backbone_name}` first"
    )


def load_backbone_weights(backbone: ResNet, file: Path | None) -> None:
    """Fill `backbone` with the weights of a file; None leaves it as it is.

    Raises:
        WeightsError: an unreadable file, or one that does not fill every parameter and buffer of the backbone with
            the right shape.
    """
    if file is not None:
        fill_backbone(backbone, read_state_dict(file), file)


def locate_backbone_weights(weights: str, backbone_name: str, *, offline: bool) -> Path | None:
    """The file that holds the weights, downloaded if asked for by name and not cached; None for "none".

    Raises:
        WeightsError: no such file, unknown name, weights of another backbone, or the download is not possible.
    """
    if weights == NO_WEIGHTS:
        return None
    if weights.endswith(FILE_SUFFIXES) or "/" in weights or Path(weights).is_file():
        file = Path(weights)
        if not file.is_file():
            raise WeightsError(f"backbone weights {weights}: no such file")
        return file
    return _cached_or_downloaded(_named_weights(weights, backbone_name), offline=offline)


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, as CPU tensors, out of `state_dict` or `model` if nested there.

    Only plain data is unpickled, so a malicious file cannot run code.

    Raises:
        WeightsError: damaged file, or one with anything but tensors and plain settings in it.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # SwAV and PixPro save their options too
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = str(error).split("\n", maxsplit=1)[0].split(". ", maxsplit=1)[0] or type(error).__name__
        raise WeightsError(
            f"backbone weights {file}: not a readable PyTorch file of plain tensors ({reason}); get it again, or save "
            "just the model's state_dict() with torch.save"
        ) from None
    for key in NESTING_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = _only_tensors(content)
    if not tensors:
        raise WeightsError(f"backbone weights {file}: no tensors in it; save the model's state_dict() with torch.save")
    return tensors


def fill_backbone(backbone: ResNet, state_dict: dict[str, Tensor], source: Path) -> None:
    """Copy a checkpoint's tensors into the backbone; keys that are not the backbone's are left out.

    Args:
        state_dict: names as in torchvision, behind one of `PREFIXES`.
        source: where it came from, for messages.

    Raises:
        WeightsError: naming the first keys that are missing, have another shape, or are of a deeper network.
    """
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}conv1.weight" in state_dict), None)
    if prefix is None:
        example = next(iter(state_dict))
        raise WeightsError(
            f"backbone weights {source}: not a ResNet: 'conv1.weight' not found under any known prefix "
            f"(first key: '{example}')"
        )
    found = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    _check_fit(backbone, found, source)
    wanted = backbone.state_dict()
    # Checkpoints from before PyTorch 0.4.1 have no `num_batches_tracked`; it is not used with a fixed momentum.
    backbone.load_state_dict({name: found.get(name, tensor) for name, tensor in wanted.items()})


def _check_fit(backbone: ResNet, found: dict[str, Tensor], source: Path) -> None:
    wanted = {name: t for name, t in backbone.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in found]
    reshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    # Every key of a ResNet-50 is also in a ResNet-101: too many stages' blocks mean another network.
    surplus = [
        name
        for name in found
        if BODY_KEY.match(name) and not name.endswith("num_batches_tracked") and name not in wanted
    ]
    for problem, names in (("missing", missing), ("of another shape", reshaped), ("too many", surplus)):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise WeightsError(
                f"backbone weights {source}: do not fit {backbone.name}: {len(names)} tensors "
                f"{problem}: {shown}; use a file of a {backbone.name}, or change the backbone"
            )


def _only_tensors(content: Any) -> dict[str, Tensor]:
    if isinstance(content, nn.Module) or not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _named_weights(weights: str, backbone_name: str) -> WeightsEnum:
    known = get_model_weights(backbone_name)
    choices = ", ".join(member.name for member in known)
    try:
        member = get_weight(weights) if "." in weights else known[weights]
    except (KeyError, ValueError):
        raise WeightsError(
            f"backbone weights '{weights}': neither a file nor weights of {backbone_name}; "
            f"known: none, workspace, DEFAULT, {choices}, or the path of a .pth file"
        ) from None
    if not isinstance(member, known):
        raise WeightsError(f"backbone weights '{weights}': not for {backbone_name}, which has: {choices}")
    return member


def _cached_or_downloaded(weights: WeightsEnum, *, offline: bool) -> Path:
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
