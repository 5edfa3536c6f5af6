"""Detectors of torchvision: RetinaNet, Faster and Mask R-CNN on ResNets, in their first and second versions.

They have the names that `torchvision_names` exports, or older ones. Settings make our detectors work like
torchvision's, except that ours predict no side shorter than 1/62 of the anchor's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import get_weight

from aligndet_cli.errors import WeightsError
from aligndet_cli.tools.conversion.rules import Renamed, Rule, rename_all, value_of_mark
from aligndet_cli.tools.conversion.torchvision_names import RULES

# The norms of these released detectors add nothing to the variance, in training as in torchvision's evaluation.
_WITHOUT_EPS = ("FasterRCNN_ResNet50_FPN", "MaskRCNN_ResNet50_FPN", "RetinaNet_ResNet50_FPN")
_MARKS = {
    "head.classification_head.": "retinanet",
    "roi_heads.mask_head.": "mask-rcnn",
    "roi_heads.box_head.": "faster-rcnn",
}
EPS = 1e-5  # of our norms, and of torchvision's in all other files
_PYRAMID: tuple[Rule, ...] = (
    ("backbone.fpn.extra_blocks.p#.*", "neck.pyramid.extra_blocks.p#.0.*"),
    *(
        (f"backbone.fpn.{blocks}.#.{part}", f"neck.pyramid.{blocks}.#.0.{part}")
        for blocks in ("inner_blocks", "layer_blocks")
        for part in ("weight", "bias")
    ),
)
_OLD_DENSE: tuple[Rule, ...] = tuple(
    (f"head.{theirs}.conv.{2 * index}.*", f"head.{ours}.{index}.0.*")
    for theirs, ours in (("classification_head", "class_tower"), ("regression_head", "box_tower"))
    for index in range(4)
)
_OLD_RCNN: tuple[Rule, ...] = (
    ("rpn.head.conv.*", "rpn.conv.*"),
    ("roi_heads.box_head.fc6.*", "head.fc.*"),
    ("roi_heads.box_head.fc7.*", "head.extra_fcs.0.*"),
    *((f"roi_heads.mask_head.mask_fcn{index + 1}.*", f"mask_head.convs.{index}.0.*") for index in range(4)),
)
# Torchvision's background comes first, and has boxes and masks that are never used.
_WITHOUT_BACKGROUND = {
    "class_predictor": lambda rows: rows.roll(-1, 0),
    "box_predictor": lambda rows: rows[4:],
    "mask_predictor": lambda rows: rows[1:],
}


def from_torchvision(tensors: Mapping[str, Tensor], digest: str, file: Path) -> Renamed:
    """Return the state dict of a detector of torchvision under our names.

    Args:
        digest: SHA-256 of the file, by which released files are known.

    Raises:
        WeightsError: no detector of ours can equal it.
    """
    family = _family_of(tensors, file)
    old = _OLD_DENSE if family == "retinanet" else (*_fc_rules(tensors), *_OLD_RCNN)
    renamed, unknown = rename_all(tensors, (*_PYRAMID, *RULES[family], *old))
    if family != "retinanet":
        for name in renamed:
            without = _WITHOUT_BACKGROUND.get(name.partition(".")[0])
            renamed[name] = without(renamed[name]).contiguous() if without else renamed[name]
    if digest.startswith(_released_digests()):
        renamed = _with_eps(renamed)
    return Renamed(family, renamed, unknown, detector=_settings(family, renamed))


def _family_of(tensors: Mapping[str, Tensor], file: Path) -> str:
    if "head.regression_head.bbox_ctrness.weight" in tensors:
        raise WeightsError(
            f"{file}: torchvision's FCOS has its points, box sides, centerness and scores defined otherwise than ours, "
            "which would detect something else: use mmdetection's model"
        )
    family = value_of_mark(tensors, _MARKS)
    if family is None:
        raise WeightsError(
            f"{file}: none of torchvision's detectors that can be imported: {', '.join(_MARKS.values())}"
        )
    return family


def _fc_rules(tensors: Mapping[str, Tensor]) -> list[Rule]:
    """Return rules of the fully connected layers, whose numbers count convolutions, layers and the ReLUs between."""
    numbers = [name.split(".")[2] for name in tensors if name.startswith("roi_heads.box_head.")]
    is_fc = [number for number in numbers if f"roi_heads.box_head.{number}.weight" in tensors and number.isdigit()]
    ours = ("head.fc.*", "head.extra_fcs.0.*")
    return [
        (f"roi_heads.box_head.{number}.*", name) for number, name in zip(sorted({*is_fc}, key=int), ours, strict=False)
    ]


def _settings(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return settings that make our detector work like torchvision's around the network."""
    if family != "retinanet":
        return {"anchors": "torchvision", "roi_aligned": False, "roi_sampling_ratio": 2, "min_box_side": 0.01}
    return {"anchors": "torchvision", "extra_levels": find_extra_levels(tensors), "max_detections": 300}


def find_extra_levels(tensors: Mapping[str, Tensor]) -> str:
    """Return RetinaNet's `extra_levels` by its state dict: P6 is made from P5 if as many channels go in as come out."""
    p6 = tensors.get("neck.pyramid.extra_blocks.p6.0.weight")
    return "from_p5" if p6 is not None and p6.shape[0] == p6.shape[1] else "from_c5_relu"


def _released_digests() -> tuple[str, ...]:
    """Return the first digits of the SHA-256 of released files, in which their names end."""
    urls = [str(get_weight(f"{name}_Weights.COCO_V1").value.url) for name in _WITHOUT_EPS]
    return tuple(url.rpartition("-")[2].removesuffix(".pth") for url in urls)


def _with_eps(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with scales of norms that make up for the `EPS` that our norms add to the variance."""
    changed = dict(tensors)
    for name, variance in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "running_var":
            factor = ((variance.double() + EPS) / variance.double()).sqrt()
            changed[f"{owner}.weight"] = (tensors[f"{owner}.weight"].double() * factor).to(torch.float32)
    return changed
