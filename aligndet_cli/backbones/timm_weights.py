"""Weights of the networks of timm: from the Hub, and from files in timm's layout or one that timm converts."""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aligndet_cli.backbones.from_timm import create_body, create_whole, pretrained_of
from aligndet_cli.backbones.layouts import CLASSIFIERS, IMAGENET_CLASSES, FoundBackbone, recognise
from aligndet_cli.backbones.plain import Tensors, read_plain, require_finite, state_dicts
from aligndet_cli.errors import WeightsError
from aligndet_cli.hub import fetch_weights

WEIGHTS = "timm"  # as the setting `backbone.weights`: those that timm names for a network, from the Hub
_BODY = "body."
_HUB_FILE = "model.safetensors"
_OUTER = ("", "backbone.", "encoder.", "visual.trunk.")  # prefixes of a network in files of whole methods and detectors


def licence_of(name: str) -> str:
    """Return the licence of the weights that timm names for a network, or what is known of it."""
    return pretrained_of(name).license or "not told by timm, see where they come from"


def shows_labels(name: str) -> bool:
    """Return True if the weights that timm names for a network are those of an ImageNet classifier."""
    return (pretrained_of(name).num_classes or 0) >= IMAGENET_CLASSES


def fetch_timm_weights(name: str, *, offline: bool) -> Path:
    """Return the weights that timm names for a network as a file in the cache of the Hub, downloaded if need be.

    Raises:
        WeightsError: there are none, or they are not in the cache and must not be downloaded.
    """
    repository = pretrained_of(name).hf_hub_id
    if not repository:
        raise WeightsError(f"backbone weights 'timm': timm names none for {name}; give a file, or none")
    return fetch_weights(f"hub:{repository}", file=_HUB_FILE, offline=offline)


def read_timm(name: str, file: Path) -> FoundBackbone:
    """Read the weights of a network of timm from a file: in timm's layout, or in one that timm knows how to convert.

    Raises:
        WeightsError: the file is damaged, or holds another network.
    """
    title = f"backbone weights {file}"
    content = read_plain(file, title)
    whole = create_whole(name)
    with torch.device("meta"):
        wanted = {f"{_BODY}{key}": value for key, value in create_body(name).state_dict().items()}
    places = {_flat(key.removeprefix(_BODY)): key for key in wanted}
    own, best, num_classes = Tensors(), (0, 0), 0
    for _, tensors in state_dicts(content):
        for candidate in _candidates(tensors, whole):
            found = {places[_flat(key)]: value for key, value in candidate.items() if _flat(key) in places}
            fitting = sum(value.shape == wanted[key].shape for key, value in found.items())
            if (fitting, len(found)) > best:
                best = fitting, len(found)
                own, deeper, num_others = found, _deeper(candidate, whole), len(tensors) - len(found)
                heads = [both[key] for both in (tensors, candidate) for key in CLASSIFIERS if key in both]
                num_classes = max((len(head) for head in heads if head.ndim), default=0)
    if len(own) * 2 < len(places):
        raise WeightsError(f"{title}: hold no {name} in a layout that timm knows{_what_it_is(content)}")
    require_finite(own.items(), title)
    return FoundBackbone("timm", "timm", own | deeper, num_others, num_classes)


def _candidates(tensors: Tensors, whole: nn.Module) -> list[Tensors]:
    """Return the tensors of a file as they may be meant: as they are, and converted by timm."""
    found = []
    for prefix in (*_OUTER, _BODY):
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if own:
            found.append(own)
            convert = vars(sys.modules[type(whole).__module__]).get("checkpoint_filter_fn")
            if convert is not None:
                try:
                    found.append(convert(dict(own), whole))
                except Exception:  # its conversions raise anything for a network that is none of theirs
                    continue
    return found


def _deeper(candidate: Tensors, whole: nn.Module) -> Tensors:
    """Return tensors of blocks that the network lacks: then the file is of a larger one."""

    def pattern(key: str) -> str:
        return re.sub(r"\d+", "#", key)

    known = {_flat(key) for key in whole.state_dict()}
    patterns = {pattern(key) for key in whole.state_dict()}
    return {
        f"{_BODY}{key}": value
        for key, value in candidate.items()
        if _flat(key) not in known and pattern(key) in patterns
    }


def _flat(key: str) -> str:
    """Return a name that is the same in a whole network and in its body, which `features_only` makes flatter."""
    return key.removeprefix("model.").replace(".", "_")


def _what_it_is(content: Any) -> str:
    found = recognise(content)
    return f", but a {found.family} of {found.layout}; name one with --backbone" if found else "; use another file"
