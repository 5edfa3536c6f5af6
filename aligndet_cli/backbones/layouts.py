"""Layouts in which backbones are published: their place in a file, and the names of their tensors.

A file is recognised by its keys alone. `LAYOUTS` lists the prefix under which each method keeps the network that it
recommends, `NAMINGS` the tensor names of each library; a file may combine any two.
Source: docs/paper.md §6.5, and the released code of each method.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from aligndet_cli.backbones.interface import Family
from aligndet_cli.backbones.plain import Tensors, state_dicts


@dataclass(frozen=True)
class Layout:
    """Describe where a published file keeps the backbone.

    Attributes:
        name: method or library; "" = the naming tells enough.
        prefix: start of the backbone's names, which are bare, see `bare_name`.
        inside: keys of the file, one of which must hold it; () = no condition.
        beside: at least one key must begin with one of these; () = no condition.
    """

    name: str
    prefix: str
    inside: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Naming:
    """Describe how a library names the tensors of a backbone.

    Attributes:
        marker: name of a tensor that every network with this naming has.
        rules: (pattern of a whole name, torchvision's name); other names are not part of the backbone.
        absent: name of a tensor that only a network that is not this family has; "" = none.
        prepare: changes the names of all tensors before the rules.
        reorder: `(torchvision's name, tensor)` -> tensor with its values in torchvision's order and shape.
    """

    name: str
    family: Family
    marker: str
    rules: tuple[tuple[str, str], ...]
    absent: str = ""
    prepare: Callable[[Tensors], Tensors] = lambda tensors: tensors
    reorder: Callable[[str, Tensor], Tensor] = lambda name, value: value


@dataclass(frozen=True)
class FoundBackbone:
    """A backbone in a file.

    Attributes:
        layout: name of the layout, for people.
        tensors: tensors of the backbone by torchvision's names.
        others: names of all other tensors in the same part of the file.
        num_classes: number of outputs of the image classifier beside the backbone; 0 = no classifier.
    """

    layout: str
    family: Family
    tensors: Tensors
    others: tuple[str, ...]
    num_classes: int = 0

    @property
    def num_others(self) -> int:
        """Number of tensors in the file that are left out."""
        return len(self.others)

    @property
    def is_supervised(self) -> bool:
        """True if the backbone was trained on the labels of ImageNet (1,000 or 21,841 classes)."""
        return self.num_classes >= IMAGENET_CLASSES


IMAGENET_CLASSES = 1000
# The last layer of image classifiers: torchvision's and timm's ResNet, their MobileNets, torchvision's ConvNeXt; the
# official Swin and ConvNeXt, timm and mmpretrain; EfficientNet-Lite. Projections of self-supervised methods have other
# prefixes.
CLASSIFIERS = (
    *("fc.weight", "classifier.1.weight", "classifier.weight", "classifier.2.weight"),
    *("head.weight", "head.fc.weight", "_fc.weight"),
)


# The first that fits wins. Each names the network that its method recommends: of DINO and SlotCon the momentum network
# (teacher, encoder_k), of MoCo, PixPro, SoCo and BYOL, whose files hold both, the trained one.
LAYOUTS = (
    Layout("DINO", "backbone.", inside=("teacher",)),
    Layout("BYOL", "encoder.", inside=("online_backbone",)),
    Layout("BYOL", "", inside=("online_backbone",)),
    *(
        Layout("BYOL", f"{network}.{body}")
        for network in ("online_encoder", "online_network")
        for body in ("encoder.", "net.", "backbone.", "")
    ),
    Layout("SoCo's momentum network", "encoder.", inside=("model_ema",)),
    Layout("SlotCon", "encoder_k.", beside=("grouping_",)),
    Layout("MoCo", "encoder_q."),
    Layout("SimMIM", "encoder.", beside=("encoder.mask_token",)),
    Layout("PixPro", "encoder.", beside=("value_transform.", "projector_instance.")),
    Layout("SoCo", "encoder.", inside=("model",), beside=("predictor.",)),
    Layout("SimSiam", "encoder.", beside=("predictor.",)),
    Layout("PixPro, SoCo or like them", "encoder."),
    Layout("DenseCL", "backbone.", beside=("encoder_q.0.",)),
    Layout("AlignDet's own", "backbone.backbone."),
    Layout("mmdetection", "backbone.", beside=("neck.", "bbox_head.", "rpn_head.", "roi_head.")),
    Layout("", "backbone."),
    Layout("SwAV", "", beside=("projection_head.", "prototypes.")),
    Layout("", ""),
)


def recognise(content: Mapping[str, object]) -> FoundBackbone | None:
    """Return the backbone in the content of a weights file, under torchvision's names; None in an unknown layout."""
    for keys, tensors in state_dicts(content):
        for layout in LAYOUTS:
            if layout.inside and not set(layout.inside) & set(keys):
                continue
            if found := _named(layout, tensors):
                return found
    return None


def _named(layout: Layout, tensors: Tensors) -> FoundBackbone | None:
    if layout.beside and not any(name.startswith(layout.beside) for name in tensors):
        return None
    naming = next((naming for naming in NAMINGS if _fits(naming, layout.prefix, tensors)), None)
    if naming is None:
        return None
    own = {name.removeprefix(layout.prefix): t for name, t in tensors.items() if name.startswith(layout.prefix)}
    backbone, left_out = rename_tensors(naming, own)
    others = (*(name for name in tensors if not name.startswith(layout.prefix)), *left_out)
    num_classes = max((len(tensors[name]) for name in CLASSIFIERS if name in tensors and not layout.name), default=0)
    return FoundBackbone(layout.name or naming.name, naming.family, backbone, others, num_classes)


def _fits(naming: Naming, prefix: str, tensors: Tensors) -> bool:
    return prefix + naming.marker in tensors and not (naming.absent and prefix + naming.absent in tensors)


def rename_tensors(naming: Naming, tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Return the state dict of the backbone under torchvision's names, and the names of all other tensors."""
    renamed, others = {}, []
    for name, value in naming.prepare(tensors).items():
        for pattern, new_name in naming.rules:
            match = re.fullmatch(pattern, name)
            if match:
                new = match.expand(new_name)
                renamed[new] = naming.reorder(new, value)
                break
        else:
            others.append(name)
    return renamed, tuple(others)


def _swin_rules(
    stage: str, patches: str, attention: str, mlp: tuple[str, str], *, is_merging_first: bool = False
) -> tuple[tuple[str, str], ...]:
    """Return the rules of a library that names its stages `stage`.0 to `stage`.3.

    Args:
        patches: pattern of the convolution of the patch embedding.
        attention: pattern of the attention of a block.
        mlp: patterns of the two layers of a block's MLP.
        is_merging_first: a patch merging begins a stage, as in timm; in the official code it ends the stage.
    """
    rules = [
        (rf"patch_embed\.{patches}\.(\w+)", r"features.0.0.\1"),
        (r"patch_embed\.norm\.(\w+)", r"features.0.2.\1"),
        (r"norm3?\.(\w+)", r"norm.\1"),
        (r"(norm[012]\.\w+)", r"\1"),
    ]
    for i in range(4):
        block, new_block = rf"{stage}\.{i}\.blocks\.(\d+)", rf"features.{2 * i + 1}.\1"
        merging = 2 * i if is_merging_first else 2 * i + 2
        rules += [
            (rf"{block}\.(norm[12]\.\w+)", rf"{new_block}.\2"),
            (rf"{block}\.{attention}\.((?:qkv|proj)\.\w+|relative_position_bias_table)", rf"{new_block}.attn.\2"),
            (rf"{block}\.{mlp[0]}\.(\w+)", rf"{new_block}.mlp.0.\2"),
            (rf"{block}\.{mlp[1]}\.(\w+)", rf"{new_block}.mlp.3.\2"),
            (rf"{stage}\.{i}\.downsample\.((?:norm|reduction)\.\w+)", rf"features.{merging}.\1"),
        ]
    return tuple(rules)


def _unfolded_to_concatenated(name: str, value: Tensor) -> Tensor:
    """Reorder mmdetection's patch merging weights (..., 4C) for torchvision; return other tensors unchanged.

    mmdetection merges by `nn.Unfold`, so its last axis is channel, row, column of the 2 x 2 cells; torchvision and the
    official code concatenate, so theirs is column, row, channel.
    """
    if not re.match(r"features\.[246]\.", name):
        return value
    cells = value.unflatten(-1, (-1, 2, 2))  # (..., C, row, column)
    return cells.transpose(-1, -3).flatten(-3)  # (..., column, row, C) -> (..., 4C)


def _mobilenet_rules() -> tuple[tuple[str, str], ...]:
    """Return the rules of mmdetection: seven layers of blocks, whose convolutions have names instead of numbers."""
    rules = [(r"conv1\.conv\.(\w+)", r"features.0.0.\1"), (r"conv1\.bn\.(\w+)", r"features.0.1.\1")]
    feature = 1
    for layer, num_blocks in enumerate((1, 2, 3, 4, 3, 3, 1), start=1):
        depthwise = 0 if layer == 1 else 1  # the first block has no expansion
        for block in range(num_blocks):
            old, new = rf"layer{layer}\.{block}", rf"features.{feature}.conv"
            rules += [
                (rf"{old}\.expand_conv\.conv\.(\w+)", rf"{new}.0.0.\1"),
                (rf"{old}\.expand_conv\.bn\.(\w+)", rf"{new}.0.1.\1"),
                (rf"{old}\.depthwise_conv\.conv\.(\w+)", rf"{new}.{depthwise}.0.\1"),
                (rf"{old}\.depthwise_conv\.bn\.(\w+)", rf"{new}.{depthwise}.1.\1"),
                (rf"{old}\.linear_conv\.conv\.(\w+)", rf"{new}.{depthwise + 1}.\1"),
                (rf"{old}\.linear_conv\.bn\.(\w+)", rf"{new}.{depthwise + 2}.\1"),
            ]
            feature += 1
    return (*rules, (r"conv2\.conv\.(\w+)", r"features.18.0.\1"), (r"conv2\.bn\.(\w+)", r"features.18.1.\1"))


def _convnext_rules(steps: tuple[str, str], block: str, names: tuple[str, str, str]) -> tuple[tuple[str, str], ...]:
    """Return the rules of a library that calls the stages of a ConvNeXt `stages`.0 to `stages`.3.

    Args:
        steps: patterns of the stem, and of the steps between stages; here and in `block`, # is the stage's number.
        block: pattern of a block, whose group is its number in its stage.
        names: of the convolution of a block, and of its two linear layers.
    """
    stem, step = steps
    rules = [(rf"{stem}\.([01]\.\w+)", r"features.0.\1"), (r"(norm[0123]\.\w+)", r"\1")]
    for i in range(4):
        old, new = block.replace("#", str(i)), rf"features.{2 * i + 1}.\1"
        rules += [(rf"{step.replace('#', str(i))}\.([01]\.\w+)", rf"features.{2 * i}.\1")] if i else []
        rules.append((rf"{old}\.gamma", rf"{new}.layer_scale"))
        for name, place in zip((names[0], "norm", *names[1:]), (0, 2, 3, 5), strict=True):
            rules.append((rf"{old}\.{name}\.(\w+)", rf"{new}.block.{place}.\2"))
    return tuple(rules)


def _layer_scale(name: str, value: Tensor) -> Tensor:
    """Give ConvNeXt's layer scale (C,) torchvision's shape (C, 1, 1); return other tensors unchanged."""
    return value.reshape(-1, 1, 1) if name.endswith(".layer_scale") else value


def _in_rows(tensors: Tensors) -> Tensors:
    """Rename the blocks of an EfficientNet, `_blocks.N.`, to `rows.R.B.`: a row ends where their width changes."""
    places, width, row, number = {}, 0, 0, 0
    for block in range(len(tensors)):
        last = tensors.get(f"_blocks.{block}._project_conv.weight")
        if last is None:
            break
        row, number = (row, number + 1) if len(last) == width else (row + 1, 0)
        places[f"_blocks.{block}"], width = f"rows.{row}.{number}", len(last)

    def renamed(name: str) -> str:
        block = ".".join(name.split(".")[:2])
        return places[block] + name.removeprefix(block) if block in places else name

    return {renamed(name): value for name, value in tensors.items()}


def _lite_rules() -> tuple[tuple[str, str], ...]:
    """Return the rules of the names of lukemelas' EfficientNet-PyTorch, with rows, for EfficientNet-Lite."""
    rules = [
        (r"_conv_stem\.(\w+)", r"features.0.0.\1"),
        (r"_bn0\.(\w+)", r"features.0.1.\1"),
        (r"_conv_head\.(\w+)", r"features.8.0.\1"),
        (r"_bn1\.(\w+)", r"features.8.1.\1"),
    ]
    parts = ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
    for rows, places in ("1", (0, 0, 2)), ("[2-7]", (0, 1, 3)):  # the first row has no expansion
        for names, place in zip(parts, places, strict=True):
            old, new = rf"rows\.({rows})\.(\d+)", rf"features.\1.\2.block.{place}"
            rules += [(rf"{old}\.{name}\.(\w+)", rf"{new}.{index}.\3") for index, name in enumerate(names)]
    return tuple(rules)


# lightly and BYOL-PyTorch number the children of torchvision's ResNet.
_NUMBERED = (("0", "conv1"), ("1", "bn1"), *((f"{i + 3}", f"layer{i}") for i in range(1, 5)))
_AS_IT_IS = ((r"features\..+", r"\g<0>"),)
_OFFICIAL_MLP = (r"mlp\.fc1", r"mlp\.fc2")
_DOWNSAMPLE_LAYERS = (r"downsample_layers\.0", r"downsample_layers\.#")

# The first naming whose marker is there wins; timm's Swin also has the markers of the official code.
NAMINGS = (
    Naming("torchvision", "resnet", "conv1.weight", ((r"(?:conv1|bn1|layer\d+)\..+", r"\g<0>"),)),
    Naming("lightly", "resnet", "4.0.conv1.weight", tuple((rf"{old}\.(.+)", rf"{new}.\1") for old, new in _NUMBERED)),
    Naming("torchvision", "mobilenet", "features.1.conv.0.0.weight", _AS_IT_IS),
    Naming("mmdetection", "mobilenet", "layer1.0.depthwise_conv.conv.weight", _mobilenet_rules()),
    Naming("torchvision", "swin", "features.1.0.attn.qkv.weight", ((r"(?:features|norm[012]?)\..+", r"\g<0>"),)),
    Naming(
        "timm",
        "swin",
        "layers.3.downsample.reduction.weight",
        _swin_rules("layers", "proj", "attn", _OFFICIAL_MLP, is_merging_first=True),
    ),
    Naming(
        "official Swin",
        "swin",
        "layers.0.blocks.0.attn.qkv.weight",
        _swin_rules("layers", "proj", "attn", _OFFICIAL_MLP),
    ),
    Naming(
        "mmdetection",
        "swin",
        "stages.0.blocks.0.attn.w_msa.qkv.weight",
        _swin_rules("stages", "projection", r"attn\.w_msa", (r"ffn\.layers\.0\.0", r"ffn\.layers\.1")),
        reorder=_unfolded_to_concatenated,
    ),
    Naming("torchvision", "convnext", "features.1.0.layer_scale", ((r"(?:features|norm[0123])\..+", r"\g<0>"),)),
    Naming(
        "timm",
        "convnext",
        "stages.0.blocks.0.conv_dw.weight",
        _convnext_rules(
            ("stem", r"stages\.#\.downsample"),
            r"stages\.#\.blocks\.(\d+)",
            ("conv_dw", r"mlp\.fc1", r"mlp\.fc2"),
        ),
        reorder=_layer_scale,
    ),
    Naming(
        "official ConvNeXt",
        "convnext",
        "stages.0.0.dwconv.weight",
        _convnext_rules(_DOWNSAMPLE_LAYERS, r"stages\.#\.(\d+)", ("dwconv", "pwconv1", "pwconv2")),
        reorder=_layer_scale,
    ),
    Naming(
        "mmdetection",
        "convnext",
        "stages.0.0.depthwise_conv.weight",
        _convnext_rules(
            _DOWNSAMPLE_LAYERS, r"stages\.#\.(\d+)", ("depthwise_conv", "pointwise_conv1", "pointwise_conv2")
        ),
        reorder=_layer_scale,
    ),
    # Other libraries name EfficientNets in ways that do not tell how they pad, so only torchvision's are taken. B0 to
    # B7 squeeze in the first row; V2 has one convolution in its blocks there, Lite two.
    Naming("torchvision", "efficientnet", "features.1.0.block.1.fc1.weight", _AS_IT_IS),
    Naming("AlignDet's own", "efficientnet-lite", "features.1.0.block.2.0.weight", _AS_IT_IS),
    Naming("torchvision", "efficientnet", "features.1.0.block.0.0.weight", _AS_IT_IS),
    Naming(
        "original EfficientNet-Lite",
        "efficientnet-lite",
        "_blocks.0._depthwise_conv.weight",
        _lite_rules(),
        absent="_blocks.0._se_reduce.weight",
        prepare=_in_rows,
    ),
)
