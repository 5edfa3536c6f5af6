"""Weights of a backbone: by torchvision name or from a file, checked key by key."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from aligndet_cli.backbones.build import NAMES, WEIGHTS_FILE, BackboneConfig, build_backbone, single_name
from aligndet_cli.backbones.composite import CompositeBackbone
from aligndet_cli.backbones.from_timm import PREFIX as TIMM_PREFIX
from aligndet_cli.backbones.from_timm import facts_of, is_of_timm
from aligndet_cli.backbones.interface import Backbone
from aligndet_cli.backbones.layouts import FoundBackbone, recognise
from aligndet_cli.backbones.plain import read_plain, require_finite, state_dicts
from aligndet_cli.backbones.timm_weights import WEIGHTS as TIMM_WEIGHTS
from aligndet_cli.backbones.timm_weights import fetch_timm_weights, licence_of, read_timm, shows_labels
from aligndet_cli.backbones.torchvision_weights import cached_or_downloaded, named_weights, torchvision_weights
from aligndet_cli.config import NO_WEIGHTS, WORKSPACE_WEIGHTS
from aligndet_cli.errors import WeightsError
from aligndet_cli.files import hash_files, read_json
from aligndet_cli.logs import logger
from aligndet_cli.workspace import Artifact, Workspace

# Tensors that follow from the structure, or are unused with a fixed momentum; files of old versions lack them.
DERIVED = ("num_batches_tracked", "relative_position_index")
_TIMM_BESIDE = (
    'if it is one of timm, name it in a config.json beside the file: {"architecture": "vit_small_patch14_dinov2"}'
)
INPUT = ("mean", "std")  # of the network's images, which it has from its name
BIAS_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class WeightsTraining:
    """Training of a backbone's weights. Only the content of their file decides, never its name or folder.

    Attributes:
        layout: name of the file's layout, see `LAYOUTS`; None for random weights.
        is_supervised: True if the file shows that ImageNet's labels were used: a classifier lies beside the backbone.
    """

    layout: str | None = None
    is_supervised: bool = False

    @property
    def reason(self) -> str:
        """Evidence in the file, for people."""
        if self.is_supervised:
            return "an ImageNet classifier lies beside them in their file"
        return "random weights" if self.layout is None else f"{self.layout} layout without an ImageNet classifier"


@dataclass(frozen=True)
class BackboneWeights:
    """Weights of a backbone and their origin.

    Attributes:
        file: None = random weights.
        content_hash: hash of the file for the manifest, "none" without a file.
        origin: one line for people.
        licence: of weights that timm names, as timm tells it; None: nobody tells.
    """

    file: Path | None
    content_hash: str
    origin: str
    training: WeightsTraining = WeightsTraining()
    licence: str | None = None

    def terms(self, key: str = "backbone_licence") -> dict[str, str]:
        """Return the licence as an entry of a result; none if nobody tells it."""
        return {} if self.licence is None else {key: self.licence}


RANDOM_WEIGHTS = BackboneWeights(None, NO_WEIGHTS, "none (random)")


def find_backbone_weights(config: BackboneConfig, workspace: Workspace, *, offline: bool) -> BackboneWeights:
    """Return the weights that the setting `backbone.weights` means in this workspace.

    Args:
        offline: never download; weights by name must be in torchvision's cache.

    Raises:
        ConfigError: timm does not have the backbone, or it cannot serve.
        WeightsError: "workspace" without a run of this backbone, or a file that is not found or does not fit.
    """
    if is_of_timm(config.name):
        facts_of(config.name)
    if config.weights in WORKSPACE_WEIGHTS:
        return _workspace_weights(config.weights, config.name, workspace)
    file = locate_backbone_weights(config.weights, config.name, offline=offline)
    if file is None:
        return RANDOM_WEIGHTS
    found = read_backbone(file, config.name)
    _fit(_without_memory(single_name(config.name)), found, file)
    origin, licence = f"{config.weights} ({found.layout} layout)", None
    if is_of_timm(config.name) and config.weights == TIMM_WEIGHTS:
        licence = licence_of(config.name)
        origin = f"timm's, licence: {licence}"
    training = WeightsTraining(found.layout, found.is_supervised)
    return BackboneWeights(file, hash_files([file]), origin, training, licence)


def weights_of(artifact: Artifact) -> BackboneWeights:
    """Return the final weights of a `pretrain-image` run."""
    file = artifact.folder / "weights.pt"
    found = read_backbone(file, artifact.config()["backbone"]["name"])
    origin = f"pretrain-image/{artifact.name}"
    return BackboneWeights(file, artifact.content_hash, origin, WeightsTraining(found.layout, found.is_supervised))


def require_trained(weights: BackboneWeights, config: BackboneConfig, stage: str) -> None:
    """Make sure that a backbone that stays fixed has trained weights, unless the setting is `none`.

    Raises:
        WeightsError: the weights are random.
    """
    if weights.file is not None or config.weights == NO_WEIGHTS:
        return
    default = "DEFAULT (torchvision's, downloaded) or " if torchvision_weights(config.name) else ""
    default = "timm (downloaded) or " if is_of_timm(config.name) else default
    name = single_name(config.name)
    raise WeightsError(
        f"{stage}: its backbone stays as it is, so it needs trained weights: give --backbone-weights {default}FILE, or "
        f"run `aligndet pretrain-image DATA --backbone {name}` first; --backbone-weights none means random ones"
    )


def _workspace_weights(weights: str, backbone_name: str, workspace: Workspace) -> BackboneWeights:
    runs, backbone_name = workspace.artifacts("pretrain-image"), single_name(backbone_name)
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


def training_shown_by(weights: str, backbone_name: str) -> WeightsTraining:
    """Return how weights were trained, as far as the setting `backbone.weights` tells it without a workspace.

    Nothing is downloaded: torchvision's weights by name are ImageNet classifiers.

    Raises:
        WeightsError: the file cannot be read, or the name is unknown.
    """
    if weights in (*WORKSPACE_WEIGHTS, NO_WEIGHTS):
        return WeightsTraining()
    if WEIGHTS_FILE.is_file(weights):
        found = read_backbone(_existing(weights), backbone_name)
        return WeightsTraining(found.layout, found.is_supervised)
    if is_of_timm(backbone_name):
        _require_timm(weights, backbone_name)
        return WeightsTraining("timm", shows_labels(backbone_name))
    named_weights(weights, backbone_name)
    return WeightsTraining("torchvision", is_supervised=True)


def load_backbone_weights(backbone: Backbone, file: Path | None) -> None:
    """Fill `backbone` with the weights of a file in any known layout; None leaves it as it is.

    Both backbones of a composite get those of one.

    Raises:
        WeightsError: the file cannot be read, or does not fill every parameter and buffer with the right shape.
    """
    if file is not None:
        fill_backbone(backbone, read_backbone(file, backbone.name), file)


def locate_backbone_weights(weights: str, backbone_name: str, *, offline: bool) -> Path | None:
    """Return the file that holds the weights, downloaded if named and not cached; None for "none".

    Raises:
        WeightsError: no such file, unknown name, weights of another backbone, or the download is not possible.
    """
    if weights == NO_WEIGHTS:
        return None
    if WEIGHTS_FILE.is_file(weights):
        return _existing(weights)
    if is_of_timm(backbone_name):
        _require_timm(weights, backbone_name)
        return fetch_timm_weights(backbone_name, offline=offline)
    return cached_or_downloaded(named_weights(weights, backbone_name), offline=offline)


def _require_timm(weights: str, backbone_name: str) -> None:
    if weights != TIMM_WEIGHTS:
        raise WeightsError(
            f"backbone weights '{weights}': neither a file nor weights of {backbone_name}; known: none, workspace, "
            "timm, or the path of a weights file"
        )


def _existing(weights: str) -> Path:
    file = Path(weights)
    if not file.is_file():
        raise WeightsError(f"backbone weights {weights}: no such file")
    return file


def read_backbone(file: Path, name: str | None = None) -> FoundBackbone:
    """Read the backbone in a file, under torchvision's names, as CPU tensors.

    Only plain data is unpickled, so a malicious file cannot run code.

    Args:
        name: of the backbone that is wanted; timm's have their own names and layouts.

    Raises:
        WeightsError: the file is damaged, holds more than plain data or numbers that are none, or has an unknown
            layout.
    """
    if name is not None and is_of_timm(name):
        return read_timm(name, file)
    title = f"backbone weights {file}"
    content = read_plain(file, title)
    found = recognise(content)
    if found is None:
        name = next((name for _, tensors in state_dicts(content) for name in tensors), None)
        if name is None:
            raise WeightsError(f"{title}: no tensors in it; save the model's state_dict() with torch.save")
        raise WeightsError(
            f"{title}: no backbone in a layout that is known (first key: '{name}'); use a file of one "
            "that `aligndet ls backbones` lists, or rename its tensors as torchvision does"
        )
    require_finite(found.tensors.items(), title)
    return found


def network_of(file: Path) -> str:
    """Return the name of the network in a file: that of the settings beside it, or the one that its tensors fit.

    The settings are those of a run of ours, or a `config.json` with the `architecture`, as timm's lie on the Hub.

    Raises:
        WeightsError: the file cannot be read, has an unknown layout, or fits no network.
    """
    settings = file.with_name("config.json")
    recorded = read_json(settings) if settings.is_file() else {}
    recorded = recorded if isinstance(recorded, dict) else {}
    backbone, architecture = recorded.get("backbone"), recorded.get("architecture")
    if isinstance(backbone, dict) and isinstance(backbone.get("name"), str):
        return str(backbone["name"])
    name, problem = _fitting_network(file)
    if not isinstance(architecture, str):
        if name is None:
            raise WeightsError(f"backbone weights {file}: {problem}; {_TIMM_BESIDE}")
        return name
    # Some of timm's variants of ResNets have the tensors of the usual ones.
    is_variant = name in NAMES["resnet"] and "pretrained_cfg" in recorded and architecture != name
    return f"{TIMM_PREFIX}{architecture}" if name is None or is_variant else name


def _fitting_network(file: Path) -> tuple[str | None, str]:
    """Return the name of the network that the tensors of a file fit, or None and the reason."""
    content = read_plain(file, f"backbone weights {file}")
    found = recognise(content)
    if found is None:
        if not any(True for _ in state_dicts(content)):
            read_backbone(file)  # says what it is instead
        return None, "no backbone in a layout that tells its network"
    require_finite(found.tensors.items(), f"backbone weights {file}")
    for name in NAMES[found.family]:
        try:
            _fit(_without_memory(name), found, file)
        except WeightsError:
            continue
        return name, ""
    return None, f"hold a {found.family} that is none of {', '.join(NAMES[found.family])}"


def _without_memory(name: str) -> Backbone:
    """Build a backbone of which only names and shapes can be used."""
    with torch.device("meta"):
        return build_backbone(BackboneConfig.model_validate({"name": name}))


def fill_backbone(backbone: Backbone, found: FoundBackbone, source: Path) -> None:
    """Copy a checkpoint's tensors into the backbone; `source` is its file, for messages.

    Raises:
        WeightsError: keys are missing, have another shape, or belong to a deeper network; the first are named.
    """
    parts = [backbone.assistant, backbone.lead] if isinstance(backbone, CompositeBackbone) else [backbone]
    fitted = _fit(parts[0], found, source)
    for part in parts:
        own = part.state_dict()
        part.load_state_dict(own | {name: value for name, value in fitted.items() if name in own})
    matched = sum(not name.endswith(DERIVED) for name in fitted)
    resized = sum(value.shape != found.tensors[name].shape for name, value in fitted.items())
    logger.info(
        f"backbone weights {source}: {found.layout} layout, all {matched} tensors of the {parts[0].name} found, "
        f"{found.num_others} others left out{_first(found.others)}"
        + (f"; {resized} tables of relative positions resized to its windows" if resized else "")
    )


def _fit(backbone: Backbone, found: FoundBackbone, source: Path) -> dict[str, Tensor]:
    """Return the tensors to put into the backbone: all that it needs, in its shapes."""
    if found.family != backbone.family:
        raise WeightsError(
            f"backbone weights {source}: hold a {found.family} ({found.layout} layout), not a {backbone.name}; use "
            f"a file of a {backbone.name}, or change the backbone"
        )
    wanted = backbone.state_dict()
    given = {name: _resize_table(name, value, wanted.get(name)) for name, value in found.tensors.items()}
    needed = [
        name
        for name in wanted
        if not name.endswith(DERIVED) and not name.startswith(backbone.additions) and name not in INPUT
    ]
    missing = [name for name in needed if name not in given]
    reshaped = [
        f"{name} {tuple(value.shape)} instead of {tuple(wanted[name].shape)}"
        for name, value in given.items()
        if name in wanted and not name.endswith(DERIVED) and value.shape != wanted[name].shape
    ]
    # A ResNet-101 has every key of a ResNet-50, so surplus keys mean another network.
    surplus = [name for name in given if name not in wanted and not name.endswith(DERIVED)]
    for problem, names in (("missing", missing), ("of another shape", reshaped), ("too many", surplus)):
        if names:
            raise WeightsError(
                f"backbone weights {source}: do not fit {backbone.name} ({found.layout} layout): "
                f"{len(names)} of {len(needed)} tensors {problem}{_first(names)}; "
                f"use a file of a {backbone.name}, or change the backbone"
            )
    return {name: value for name, value in given.items() if name in wanted and value.shape == wanted[name].shape}


def _first(names: Sequence[str]) -> str:
    """Return the first names in a few words."""
    return f": {', '.join(names[:3])}" + (", ..." if len(names) > 3 else "") if names else ""


def _resize_table(name: str, value: Tensor, wanted: Tensor | None) -> Tensor:
    """Resize relative position biases (offsets, heads) of windows of another size to ours; leave other tensors alone.

    Source: the official Swin code and mmdetection: bicubic, over the square of offsets.
    """
    if not name.endswith(BIAS_TABLE) or wanted is None or value.ndim != 2 or value.shape[1:] != wanted.shape[1:]:
        return value
    side, wanted_side = math.isqrt(len(value)), math.isqrt(len(wanted))
    if side == wanted_side or side**2 != len(value):
        return value
    square = value.float().T.reshape(1, -1, side, side)  # (1, heads, side, side)
    resized = interpolate(square, (wanted_side, wanted_side), mode="bicubic")
    return resized.flatten(2)[0].T.contiguous()
