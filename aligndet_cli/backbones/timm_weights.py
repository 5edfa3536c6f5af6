"""Weights of the networks of timm: from the Hub, and from files in timm's layout or one that timm converts."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aligndet_cli.backbones.build import NAMES
from aligndet_cli.backbones.from_timm import create_body, create_whole, facts_of, pretrained_of
from aligndet_cli.backbones.jax_vits import of_jax
from aligndet_cli.backbones.layouts import CLASSIFIERS, IMAGENET_CLASSES, FoundBackbone, recognise
from aligndet_cli.backbones.plain import Tensors, read_plain, require_finite, state_dicts
from aligndet_cli.backbones.vit_layouts import Named, as_they_are, of_transformers, without_chunks
from aligndet_cli.errors import WeightsError
from aligndet_cli.hub import fetch_weights

WEIGHTS = "timm"  # as the setting `backbone.weights`: those that timm names for a network, from the Hub
_BODY = "body."
_HUB_FILE = "model.safetensors"
_DERIVED = ("relative_position_index", "bias_mask", "periods", "k_bias")  # of a block: not trained, or not used
_OUTER = ("backbone.", "encoder.", "visual.trunk.", "")  # prefixes of a network in files of whole methods and detectors


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
    with torch.device("meta"):
        wanted = {f"{_BODY}{key}": value for key, value in create_body(name).state_dict().items()}
    best = _best(content, name, wanted)
    if best is None or len(best.own) * 2 < len(wanted):
        raise WeightsError(f"{title}: hold no {name} in a layout that timm knows{_what_it_is(content)}")
    require_finite(best.own.items(), title)
    if facts_of(name).is_vit:
        _require_biases(best, name, title)
    surplus = _deeper(best.converted, create_whole(name)) | _unknown_parts(best, name)
    heads = [both[key] for both in (best.beside, best.converted) for key in CLASSIFIERS if key in both]
    num_classes = max((len(head) for head in heads if head.ndim), default=0)
    return FoundBackbone("timm", "timm", best.own | surplus, best.others(), num_classes)


@dataclass(frozen=True)
class _Candidate:
    """Tensors of a file as they may be meant.

    Attributes:
        beside: all tensors of that part of the file, by their names there.
        named: some of them, under names that timm knows or converts.
        converted: these as timm converts them, or as they are.
        own: what the network has of that, by its names.
    """

    beside: Tensors
    named: Named
    converted: Tensors
    own: Tensors

    def others(self) -> tuple[str, ...]:
        """Return the names in the file of all tensors that the network has no use for."""
        kept, places = {_flat(key.removeprefix(_BODY)) for key in self.own}, {_place(one) for one in self.own.values()}
        used: set[str] = set()
        for new, names in self.named.sources.items():
            if _flat(new) in kept or _place(self.named.tensors[new]) in places:  # a view, if timm has another name
                used.update(names)
        return tuple(name for name in self.beside if name not in used)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _best(content: Any, name: str, wanted: Tensors) -> _Candidate | None:
    """Return the tensors of a file of which most fit the network."""
    whole, best, found = create_whole(name), (0, 0), None
    places = {_flat(key.removeprefix(_BODY)): key for key in wanted}
    for _, tensors in state_dicts(content):
        for named, converted in _candidates(tensors, whole, is_vit=facts_of(name).is_vit):
            own = {places[_flat(key)]: value for key, value in converted.items() if _flat(key) in places}
            fitting = sum(value.shape == wanted[key].shape for key, value in own.items())
            if (fitting, len(own)) > best:
                best, found = (fitting, len(own)), _Candidate(tensors, named, converted, own)
    return found


def _candidates(tensors: Tensors, whole: nn.Module, *, is_vit: bool) -> Iterator[tuple[Named, Tensors]]:
    """Yield the tensors of a file as they may be meant: as they are, and converted by timm."""
    convert = vars(sys.modules[type(whole).__module__]).get("checkpoint_filter_fn")
    others = (of_transformers(tensors), of_jax(tensors)) if is_vit else ()
    for named in (*(as_they_are(tensors, prefix) for prefix in (*_OUTER, _BODY)), *filter(None, others)):
        if named.tensors:
            named = without_chunks(named) if is_vit else named  # blocks of MobileNets have two numbers
            yield named, named.tensors
            if convert is None:
                continue
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # some print what they drop
                    converted = convert(dict(named.tensors), whole)
            except Exception:  # timm's conversions raise anything for a network that is none of theirs
                continue
            yield named, converted


def _require_biases(best: _Candidate, name: str, title: str) -> None:
    """Make sure that no biases of attention are lost, which timm drops for a network that has none.

    DINOv3's own files have them, all zero in the larger ones; those of keys never count.

    Raises:
        WeightsError: some would be.
    """
    others = best.others()
    for key, value in best.named.tensors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.bias", key)
        is_lost = block and int(block[1]) < facts_of(name).num_blocks and best.named.sources[key][0] in others
        if is_lost and any(part.any() for part in value.chunk(3)[::2]):
            other = f"{name.partition('.')[0]}_qkvb"
            raise WeightsError(
                f"{title}: have biases of queries and values ({best.named.sources[key][0]}), which {name} lacks; use "
                f"--backbone {other}"
            )


def _unknown_parts(best: _Candidate, name: str) -> Tensors:
    """Return tensors of blocks that a plain ViT has no place for: then the file is of another network."""
    if not facts_of(name).is_vit:
        return {}
    known = {_flat(key) for key in create_whole(name).state_dict()}
    return {
        f"{_BODY}{key}": value
        for key, value in best.converted.items()
        if key.startswith("blocks.") and not key.endswith(_DERIVED) and _flat(key) not in known
    }


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
    if found is None:
        return "; use another file"
    names = ", ".join(NAMES[found.family])
    return f", but one of the family of {names} ({found.layout} layout); name it with --backbone"
