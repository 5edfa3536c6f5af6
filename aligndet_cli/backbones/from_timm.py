"""Backbones of the library timm by their names there, `timm:NAME`. Needs the extra `timm`.

Strides, widths, mean and deviation are what timm says of a network, and are checked on a network without memory, on
torch's meta device.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from aligndet_cli.backbones.interface import STRIDES, Backbone, crop_maps, in_threes, pad_to_strides
from aligndet_cli.backbones.vit import PATCHES, PlainViT
from aligndet_cli.errors import ConfigError, did_you_mean

PREFIX = "timm:"
_WHOLE_HW, _ODD_HW = (64, 96), (61, 83)  # sizes to check with
# Ways to let a network take images of other sizes than it was trained on; the first that works is taken.
_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})


@dataclass(frozen=True)
class Facts:
    """Properties of a network of timm that need no weights.

    Attributes:
        indices: which of its maps are c2 to c5; empty for a plain ViT.
        channels: widths of these, by level.
        ends: names of the modules that make them, in the body.
        options: for `timm.create_model`.
        is_channels_last: its maps are (B, H, W, C).
        rounds_up: it takes images of any size and rounds the sizes of maps up; others get whole patches.
        reached: names of the parameters that a level depends on, by level.
        has_layer_norm, kind: recipe and freezing depend on them; `kind` is the name of timm's module.
        num_blocks: of a plain ViT; 0 for other networks.
    """

    indices: tuple[int, ...]
    channels: dict[str, int]
    ends: tuple[str, ...]
    options: dict[str, Any]
    is_channels_last: bool
    rounds_up: bool
    reached: dict[str, frozenset[str]]
    has_layer_norm: bool
    kind: str
    num_blocks: int = 0

    @property
    def is_vit(self) -> bool:
        """True for a plain ViT."""
        return self.num_blocks > 0


class TimmBackbone(Backbone):
    """Body of a network of timm, as its `features_only` gives it; its tensors have the names that they have there."""

    family = "timm"
    classifier = "classifier"

    def __init__(self, body: nn.Module, name: str, facts: Facts) -> None:
        super().__init__(name, facts.channels)
        self.body = body
        self._facts = facts

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the maps of the four stages (B, C, H, W) by level; see `Backbone.forward`."""
        maps = self.body(self.own_input(pixels if self._facts.rounds_up else pad_to_strides(pixels)))
        if self._facts.is_channels_last:
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        return crop_maps(dict(zip(self.channels, maps, strict=True)), pixels)

    def stem(self) -> list[nn.Module]:
        """Return the modules before the first row of blocks that leads to c2, and positions that no module has."""
        return self._parts()[0]

    def stages(self) -> list[list[nn.Module]]:
        """Return the modules up to each level, behind the stem."""
        return self._parts()[1:]

    def layers(self) -> list[list[nn.Module]]:
        """Return stem and stages; of a ConvNeXt the same layers as of `convnext_tiny` and the like."""
        stem, first, second, third, last = self._parts()
        if self._facts.kind != "convnext":
            return [stem, first, second, third, last]
        [stage] = third
        step, blocks = stage.get_submodule("downsample"), stage.get_submodule("blocks")
        head, *others = in_threes(list(blocks.children()))
        return [stem, first, second, [step, *head], *others, last]

    def _idle_parts(self) -> list[nn.Module]:
        """Return the modules with parameters that no level in use depends on."""
        reached = frozenset().union(*(self._facts.reached[level] for level in self._levels))
        idle = {name.rpartition(".")[0] for name, _ in self.body.named_parameters() if name not in reached}
        return [self.body.get_submodule(name) for name in sorted(idle)]

    def _parts(self) -> list[list[nn.Module]]:
        """Return stem and stages: the modules of the body in their order, cut behind those that end a level."""
        ends = self._facts.ends
        modules, opened = list(self.body.named_children()), [self.body]
        while inside := [one for one in modules if any(end.startswith(f"{one[0]}.") for end in ends)]:
            place = modules.index(inside[0])
            name, module = modules[place]
            modules[place : place + 1] = [(f"{name}.{child}", part) for child, part in module.named_children()]
            opened.append(module)
        names = [name for name, _ in modules]
        row = _row_of(ends[0])
        start = next((place for place, name in enumerate(names) if _row_of(name) == row), 1) or 1
        cuts = [0, start, *(names.index(end) + 1 for end in ends)]
        stem, *stages = ([part for _, part in modules[first:last]] for first, last in zip(cuts, cuts[1:], strict=False))
        outside = [one for module in opened for one in module.parameters(recurse=False)]
        return [[*stem, *([nn.ParameterList(outside)] if outside else [])], *stages]


def _row_of(name: str) -> str:
    """Return the name of a row of blocks without their numbers: `blocks` for `blocks.1`, `layer` for `layer1`."""
    return re.sub(r"[._]?\d+([._].*)?$", "", name)


def is_of_timm(name: str) -> bool:
    """Return True for the name of a backbone that timm has to make."""
    return name.startswith(PREFIX)


def build_timm(name: str, *, drop_path: float | None) -> Backbone:
    """Build a network of timm with its initial weights.

    `drop_path` is the probability that the last block is left out for an image in training; it grows linearly from 0.
    None: as timm has it.

    Raises:
        ConfigError: timm is missing, or does not have it, or it cannot serve.
    """
    facts, body = facts_of(name), create_body(name, drop_path=drop_path)
    backbone = PlainViT(body, name) if facts.is_vit else TimmBackbone(body, name, facts)
    pretrained = pretrained_of(name)
    backbone.set_input(pretrained.mean, pretrained.std)
    return backbone


@functools.cache
def facts_of(name: str) -> Facts:
    """Find out what a network of timm is like; nothing is downloaded, and no memory is used for its weights.

    Raises:
        ConfigError: timm is missing, or does not have it, or it cannot serve.
    """
    _check_name(name)
    if _is_vit(name):
        return _facts_of_vit(name)
    with torch.device("meta"):
        options, indices = _find_maps(name)
        body = _create(name, options, indices).eval()
        maps = body(torch.zeros(1, 3, *_WHOLE_HW))
        widths = body.feature_info.channels()
        is_channels_last = tuple(maps[0].shape) != (1, widths[0], *(side // 4 for side in _WHOLE_HW))
        shapes = [tuple(one.shape[1:3] if is_channels_last else one.shape[2:]) for one in maps]
        if shapes != [tuple(side // stride for side in _WHOLE_HW) for stride in STRIDES.values()]:
            raise _cannot_serve(name, f"its maps of {_WHOLE_HW} pixels are {shapes}")
        reached = {level: _reached(body, one) for level, one in zip(STRIDES, maps, strict=True)}
    return Facts(
        indices=indices,
        channels=dict(zip(STRIDES, widths, strict=True)),
        ends=tuple(_place_of(end, body, name) for end in body.feature_info.module_name()),
        options=options,
        is_channels_last=is_channels_last,
        rounds_up=_rounds_up(body, is_channels_last=is_channels_last),
        reached=reached,
        has_layer_norm=any(_is_layer_norm(module) for module in body.modules()),
        kind=kind_of(name),
    )


def has_windows(name: str) -> bool:
    """Return True for a network of timm that was made for images of one size, such as a Swin."""
    return is_of_timm(name) and bool(facts_of(name).options)


def _check_name(name: str) -> None:
    timm, bare = _import(), name.removeprefix(PREFIX)
    model, _, tag = bare.partition(".")
    if not timm.is_model(bare):
        way = did_you_mean(model, timm.list_models(), "; timm.list_models() lists those that it has")
        raise ConfigError(f"--backbone {name}: timm has no such network{way}")
    if current := timm.models.get_deprecated_models().get(model):
        raise ConfigError(f"--backbone {name}: timm has a new name for it; use --backbone {PREFIX}{current}")
    if "." in bare and not timm.models.is_model_pretrained(bare):
        tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{model}.*")]
        raise ConfigError(f"--backbone {name}: timm has no weights '{tag}' of {model}{did_you_mean(tag, tags)}")


def _find_maps(name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return options with which a network takes images of any size, and which of its maps are c2 to c5."""
    reasons = []
    for options in _OPTIONS:
        try:
            body = _create(name, options).eval()
        except Exception as error:  # networks without `features_only`, or without an option, raise anything
            reasons.append(_first_line(error))
            continue
        strides = body.feature_info.reduction()
        found = [max((i for i, one in enumerate(strides) if one == stride), default=-1) for stride in STRIDES.values()]
        if -1 in found:
            told = ", ".join(map(str, dict.fromkeys(strides)))
            raise _cannot_serve(name, f"its maps are at strides {told}, and detectors need 4, 8, 16 and 32")
        try:
            body(torch.zeros(1, 3, *_WHOLE_HW))
        except Exception as error:  # a network of images of one size raises anything, too
            reasons.append(_first_line(error))
            continue
        return options, tuple(body.feature_info.out_indices[i] for i in found)
    raise _cannot_serve(name, f"it takes no images of any size ({reasons[0]})")


def _is_vit(name: str) -> bool:
    models = _import().models
    return isinstance(create_whole(name), models.vision_transformer.VisionTransformer | models.eva.Eva)


def _facts_of_vit(name: str) -> Facts:
    options = {"dynamic_img_size": True}
    with torch.device("meta"):
        body = _create_vit(name, options)
    if not isinstance(body.patch_embed, _import().layers.PatchEmbed):
        raise _cannot_serve(name, "a network of convolutions makes its patches, and a plain ViT cuts them")
    patch = body.patch_embed.patch_size
    if patch not in [(side, side) for side in PATCHES]:
        sizes = " or ".join(map(str, PATCHES))
        raise _cannot_serve(name, f"its patches have {patch[0]} pixels, and a plain ViT needs {sizes}")
    return Facts(
        indices=(),
        channels=dict.fromkeys(STRIDES, body.embed_dim),
        ends=(),
        options=options,
        is_channels_last=False,
        rounds_up=False,
        reached={},
        has_layer_norm=True,
        kind=kind_of(name),
        num_blocks=len(body.blocks),
    )


def _cannot_serve(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"--backbone {name}: cannot serve, {reason}; take one with four stages, such as timm:convnext_tiny or "
        "timm:hgnetv2_b0"
    )


def _create(name: str, options: Mapping[str, Any], indices: Sequence[int] | None = None) -> Any:
    """Build the body of a network, an `nn.Module` with `feature_info`."""
    chosen = {} if indices is None else {"out_indices": tuple(indices)}
    return _import().create_model(name.removeprefix(PREFIX), pretrained=False, features_only=True, **options, **chosen)


def _create_vit(name: str, options: Mapping[str, Any]) -> Any:
    body = _import().create_model(name.removeprefix(PREFIX), pretrained=False, num_classes=0, **options)
    body.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
    return body


def create_body(name: str, *, drop_path: float | None = None) -> Any:
    """Build the part of a network that a backbone is made of, an `nn.Module`; `drop_path` as in `build_timm`."""
    facts = facts_of(name)
    options = facts.options | ({} if drop_path is None else {"drop_path_rate": drop_path})
    return _create_vit(name, options) if facts.is_vit else _create(name, options, facts.indices)


@functools.cache
def has_drop_path(name: str) -> bool:
    """Return True for a network of timm whose blocks can be left out in training.

    Raises:
        ConfigError: timm is missing, or does not have it, or it cannot serve.
    """
    facts_of(name)
    try:
        with torch.device("meta"):
            body = create_body(name, drop_path=0.5)
    except TypeError:  # a network that has no such option
        return False
    return any(type(module).__name__.startswith("DropPath") for module in body.modules())


@functools.cache
def create_whole(name: str) -> nn.Module:
    """Build a network with its classifier, without memory."""
    with torch.device("meta"):
        whole: nn.Module = _import().create_model(name.removeprefix(PREFIX), pretrained=False)
    return whole


def kind_of(name: str) -> str:
    """Return the name of timm's module that a network is from, such as `convnext`."""
    return type(create_whole(name)).__module__.rpartition(".")[2]


def pretrained_of(name: str) -> Any:
    """Return what timm says of the weights that it names for a network."""
    return _import().models.get_pretrained_cfg(name.removeprefix(PREFIX))


def _rounds_up(body: nn.Module, *, is_channels_last: bool) -> bool:
    try:
        maps = body(torch.zeros(1, 3, *_ODD_HW, device="meta"))
    except Exception:  # a network that cuts images into patches, or cells into windows, raises anything
        return False
    sizes = [tuple(-(-side // stride) for side in _ODD_HW) for stride in STRIDES.values()]
    return [tuple(one.shape[1:3] if is_channels_last else one.shape[2:]) for one in maps] == sizes


def _reached(body: nn.Module, one: Tensor) -> frozenset[str]:
    named = dict(body.named_parameters())
    gradients = torch.autograd.grad(one.sum(), list(named.values()), retain_graph=True, allow_unused=True)
    return frozenset(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or (isinstance(module, nn.GroupNorm) and module.num_groups == 1)


def _place_of(end: str, body: nn.Module, name: str) -> str:
    """Return the name in the body of a module that ends a level; timm tells it of the whole network."""
    there, part = dict(body.named_modules()), end
    while part:  # a part of a block, such as its last activation, ends with the block
        for candidate in (part, part.replace(".", "_"), f"model.{part}"):
            if candidate in there:
                return candidate
        part = part.rpartition(".")[0]
    raise _cannot_serve(name, f"timm names no module of it as the end of a stage ({end})")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _import() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise ConfigError("--backbone timm:NAME: needs timm: pip install 'aligndet[timm]'") from None
    module: ModuleType = timm
    return module
