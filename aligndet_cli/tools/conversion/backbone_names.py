"""Backbones of mmdetection's detectors whose tensors have other names than ours: all but ResNets."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from aligndet_cli.backbones.layouts import NAMINGS, rename_tensors
from aligndet_cli.tools.conversion.rules import Rule, translate

PREFIX = "backbone."
INDEX = "relative_position_index"  # follows from the size of the windows
# CBNet v2's names of an assistant, a lead and their links, and ours. Source: VDIGPKU/CBNetV2, names and shapes only.
ASSISTANT, _MODULES = f"{PREFIX}assistant.", (f"{PREFIX}cb_modules.0.", f"{PREFIX}cb_modules.1.")
_PARTS = tuple(zip(_MODULES, (ASSISTANT, f"{PREFIX}lead."), strict=True))
_LINKS = ((f"{PREFIX}cb_linears.#.#.*", f"{PREFIX}links.#.#.*"),)
_RESNETS: tuple[Rule, ...] = (*_LINKS, *((f"{theirs}*", f"{ours}*") for theirs, ours in _PARTS))
_STEM_OF_LEAD = f"{_MODULES[1]}bn1."  # is in the files of ResNets, and nothing uses it


def is_composite(tensors: Iterable[str]) -> bool:
    """Return True for the names, ours, of a detector's tensors on two linked backbones."""
    return any(name.startswith(ASSISTANT) for name in tensors)


def _swin_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Return the rules of the official Swin's names, behind prefixes."""
    pairs = [("patch_embed.proj.*", "features.0.0.*"), ("patch_embed.norm.*", "features.0.2.*")]
    pairs += [("norm3.*", "norm.*"), ("norm#.*", "norm#.*")]
    for stage in range(4):
        block, our_block = f"layers.{stage}.blocks.#", f"features.{2 * stage + 1}.#"
        pairs += [
            (f"{block}.mlp.fc1.*", f"{our_block}.mlp.0.*"),
            (f"{block}.mlp.fc2.*", f"{our_block}.mlp.3.*"),
            (f"{block}.*", f"{our_block}.*"),
            (f"layers.{stage}.downsample.*", f"features.{2 * stage + 2}.*"),
        ]
    return tuple((f"{theirs}{old}", f"{ours}{new}") for old, new in pairs)


_SWINS: tuple[Rule, ...] = (*_LINKS, *(rule for theirs, ours in _PARTS for rule in _swin_rules(theirs, ours)))


def rename_backbone(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename the backbone's tensors in a detector's state dict.

    Returns:
        all tensors, the backbone's under our names (unknown names stay as they are, and are refused later), and the
        reasons by name of tensors that were left out.
    """
    if any(name.startswith(_MODULES) for name in tensors):
        return _rename_composite(tensors)
    own = {name.removeprefix(PREFIX) for name in tensors if name.startswith(PREFIX)}
    naming = next((naming for naming in NAMINGS if naming.marker in own), None)
    if naming is None or naming.family == "resnet":
        return dict(tensors), {}
    renamed: dict[str, Tensor] = {}
    left_out = {}
    for name, tensor in tensors.items():
        own_name = {name.removeprefix(PREFIX): tensor} if name.startswith(PREFIX) else {}
        found, _ = rename_tensors(naming, own_name)
        if found:
            renamed |= {f"{PREFIX}{ours}": value for ours, value in found.items()}
        elif name.endswith(INDEX):
            left_out[name] = "computed anew"
        else:
            renamed[name] = tensor
    return renamed, left_out


def _rename_composite(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    rules = _SWINS if any(name.startswith(f"{_MODULES[0]}layers.") for name in tensors) else _RESNETS
    renamed: dict[str, Tensor] = {}
    left_out = {}
    for name, tensor in tensors.items():
        if name.endswith(INDEX):
            left_out[name] = "computed anew"
        elif name.startswith(_STEM_OF_LEAD):
            left_out[name] = "norm of a stem that a lead has not"
        else:
            renamed[translate(name, rules, to_ours=True) or name] = tensor
    return renamed, left_out


def to_cbnet(tensors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return a detector's tensors with CBNet v2's names of its composite backbone, without what follows from its size.

    Args:
        tensors: under mmdetection's names, but for the backbone.
        family: of the two networks, `resnet` or `swin`.
    """
    rules = _SWINS if family == "swin" else _RESNETS
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(INDEX)}
    return {translate(name, rules, to_ours=False) or name: tensor for name, tensor in kept.items()}
