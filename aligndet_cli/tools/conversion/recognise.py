"""Recognition of detector weights: the layout by names of tensors, detector and backbone by their shapes."""

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from aligndet_cli.backbones import FAMILIES, BackboneConfig, build_backbone
from aligndet_cli.backbones.build import COMPOSITE
from aligndet_cli.backbones.layouts import recognise
from aligndet_cli.errors import WeightsError
from aligndet_cli.tools.conversion.backbone_names import ASSISTANT, PREFIX, is_composite
from aligndet_cli.tools.conversion.rules import value_of_mark

Layout = Literal["mmdet", "aligndet", "detectron2", "torchvision", "detr", "up-detr", "detreg", "soco"]

_MARKS: dict[str, Layout] = {
    "online_backbone.": "aligndet",
    "backbone.bottom_up.": "detectron2",
    "backbone.body.": "torchvision",
    "patch2query.": "up-detr",
    "feature_align.": "up-detr",
    "feature_embed.": "detreg",
    "backbone.0.body.": "detr",
    "bbox_head.": "mmdet",
    "rpn_head.": "mmdet",
    "neck.lateral_convs.": "soco",  # of a detector without RPN
    "fpn_lateral2.": "soco",
}
# Blocks of the four stages, and True if a block has three convolutions.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
}


def find_layout(tensors: Mapping[str, Tensor], file: Path) -> Layout:
    """Return the layout of tensors by their names.

    Raises:
        WeightsError: an unknown layout.
    """
    layout = value_of_mark(tensors, _MARKS)
    if layout is not None:
        return layout
    if recognise(tensors) is not None:
        raise WeightsError(
            f"{file}: not a detector but a backbone alone; give it to `aligndet pretrain-box --backbone-weights FILE`"
        )
    raise WeightsError(
        f"{file}: not a detector of a known layout (first key: '{next(iter(tensors))}'); known are those of "
        "mmdetection, AlignDet, detectron2, torchvision, facebookresearch/detr, UP-DETR, DETReg and SoCo"
    )


def find_shape(family: str, tensors: Mapping[str, Tensor], file: Path) -> tuple[str, dict[str, Any], int | None]:
    """Return backbone, settings and number of classes of a detector by its state dict under our names.

    The number of classes is None without a class predictor.

    Raises:
        WeightsError: the backbone is none of ours, or a part of the detector is missing.
    """
    try:
        detector = _of_detr(tensors) if family == "detr" else _of_pyramid(family, tensors)
        return _backbone_of(tensors, file), {"family": family, **detector}, _num_classes(family, tensors)
    except KeyError as error:
        raise WeightsError(f"{file}: looks like a {family}, but has no {error.args[0]}; get a complete file") from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise WeightsError(f"{file}: looks like a {family}, but its tensors have the shapes of none") from None


def _backbone_of(tensors: Mapping[str, Tensor], file: Path) -> str:
    if is_composite(tensors):
        of_one = {name.replace(ASSISTANT, PREFIX): t for name, t in tensors.items() if name.startswith(ASSISTANT)}
        return f"{COMPOSITE}{_backbone_of(of_one, file)}"
    if "backbone.features.0.0.weight" in tensors:
        return _by_features(tensors, file)
    blocks = tuple(_count(tensors, f"backbone.layer{stage}.#.conv1.weight") for stage in (1, 2, 3, 4))
    name = _RESNETS.get((blocks, "backbone.layer1.0.conv3.weight" in tensors))
    if name is None:
        example = next((key for key in tensors if key.startswith("backbone.")), "none")
        raise WeightsError(f"{file}: its backbone is none that `aligndet ls backbones` lists (first key: '{example}')")
    return name


def _by_features(tensors: Mapping[str, Tensor], file: Path) -> str:
    """Return the name of the backbone that has `features` of these shapes."""
    given = {name: t.shape for name, t in tensors.items() if name.startswith("backbone.features.")}
    for name, family in FAMILIES.items():
        if family != "resnet":
            with torch.device("meta"):
                state = build_backbone(BackboneConfig(name=name)).state_dict()
            if all(
                given.get(f"backbone.{n}") == t.shape
                for n, t in state.items()
                if n.endswith(".weight") and "features" in n
            ):
                return name
    raise WeightsError(
        f"{file}: its backbone has names of torchvision's, but the shapes of none that `aligndet ls backbones` lists"
    )


def _of_pyramid(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    neck = "neck.pyramid.inner_blocks.0"
    settings: dict[str, Any] = {
        "neck_channels": tensors[f"{neck}.0.weight"].shape[0],
        "neck_norm": _norm_of(tensors, neck),
    }
    if family in ("retinanet", "fcos"):
        return {**settings, "head_convs": _count(tensors, "head.class_tower.#.0.weight"), **_head_norm(tensors)}
    first = "" if family in ("faster-rcnn", "mask-rcnn") else ".0"  # of three heads
    fc = tensors[f"head{first}.fc.weight"]
    settings |= {
        "head_convs": _count(tensors, f"head{first}.convs.#.0.weight"),
        "head_fcs": 1 + _count(tensors, f"head{first}.extra_fcs.#.weight"),
        "head_features": fc.shape[0],
        "rpn_convs": 1 + _count(tensors, "rpn.extra_convs.#.weight"),
        "pool_size": isqrt(fc.shape[1] // settings["neck_channels"]),
    }
    if f"mask_head{first}.upsample.weight" in tensors:
        settings["mask_convs"] = _count(tensors, f"mask_head{first}.convs.#.0.weight")
        settings |= _mask_norm(tensors, first)
    if "semantic_head.logits.bias" in tensors:
        settings["semantic_classes"] = len(tensors["semantic_head.logits.bias"])
    return {**settings, **_head_norm(tensors)}


def _of_detr(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    num_queries, dim = tensors["query_embedding.weight"].shape
    return {
        "num_queries": num_queries,
        "hidden_dim": dim,
        "encoder_layers": _count(tensors, "transformer.encoder.layers.#.linear1.weight"),
        "decoder_layers": _count(tensors, "transformer.decoder.layers.#.linear1.weight"),
        "feedforward_dim": tensors["transformer.encoder.layers.0.linear1.weight"].shape[0],
        "pre_norm": "transformer.encoder.norm.weight" in tensors,
    }


def _num_classes(family: str, tensors: Mapping[str, Tensor]) -> int | None:
    bias = tensors.get("class_predictor.bias", tensors.get("class_predictor.0.bias"))
    if bias is None:
        return None
    if family == "retinanet":
        return len(bias) * 4 // len(tensors["box_predictor.bias"])  # A * K and A * 4 values for A anchors per cell
    return len(bias) - (0 if family == "fcos" else 1)  # the others have a class for the background


def _head_norm(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    first = ("head.class_tower.0", *(f"{head}{n}.convs.0" for head in ("head", "mask_head") for n in ("", ".0")))
    there = [block for block in first if f"{block}.0.weight" in tensors]
    return {"head_norm": _norm_of(tensors, there[0])} if there else {}


def _mask_norm(tensors: Mapping[str, Tensor], first: str) -> dict[str, str]:
    """Return the norm of the mask heads, if it is another than that of the box heads."""
    blocks = f"head{first}.convs.0", f"mask_head{first}.convs.0"
    if any(f"{block}.0.weight" not in tensors for block in blocks):
        return {}
    of_boxes, of_masks = (_norm_of(tensors, block) for block in blocks)
    return {} if of_boxes == of_masks else {"mask_norm": of_masks}


def _norm_of(tensors: Mapping[str, Tensor], block: str) -> str:
    if f"{block}.1.running_mean" in tensors:
        return "batch"
    return "group" if f"{block}.1.weight" in tensors else "none"


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many tensors have a name of this pattern, in which `#` stands for a number."""
    wanted = re.compile(re.escape(pattern).replace(r"\#", r"\d+"))
    return sum(wanted.fullmatch(name) is not None for name in tensors)
