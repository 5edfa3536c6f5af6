"""Detectors of detectron2 on a feature pyramid: RetinaNet, Faster and Mask R-CNN.

Settings make our detectors work like detectron2's, with two exceptions: ours keep boxes without area, and predict no
side shorter than 1/62 of the anchor's.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from aligndet_cli.detectors import retinanet
from aligndet_cli.detectors.parts import rpn
from aligndet_cli.detectors.parts.anchors import base_anchors
from aligndet_cli.errors import WeightsError
from aligndet_cli.tools.conversion.input_style import BUFFERS, apply_style, style_of_detectron2
from aligndet_cli.tools.conversion.published_torchvision import find_extra_levels
from aligndet_cli.tools.conversion.rules import Renamed, Rule, rename_all, value_of_mark

_ANCHORS = "anchor_generator.cell_anchors."
_NUM_SCALES, _NUM_RATIOS = len(retinanet.SCALES), len(retinanet.RATIOS)


def _blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Return rules of a convolution and its norm, which detectron2 keeps inside the convolution."""
    return (f"{theirs}.norm.*", f"{ours}.1.*"), (f"{theirs}.*", f"{ours}.0.*")


def _neck(finest: int) -> tuple[Rule, ...]:
    """Return rules of the pyramid, whose levels are numbered by their strides: level 3 has stride 2**3."""
    return tuple(
        rule
        for index, level in enumerate(range(finest, 6))
        for theirs, ours in (("lateral", "inner"), ("output", "layer"))
        for rule in _blocks(f"backbone.fpn_{theirs}{level}", f"neck.pyramid.{ours}_blocks.{index}")
    )


_BODY: tuple[Rule, ...] = (
    ("backbone.bottom_up.stem.conv1.norm.*", "backbone.bn1.*"),
    ("backbone.bottom_up.stem.conv1.*", "backbone.conv1.*"),
    *(
        (f"backbone.bottom_up.res{stage + 1}.#.{theirs}.*", f"backbone.layer{stage}.#.{ours}.*")
        for stage in range(1, 5)
        for theirs, ours in (
            ("shortcut.norm", "downsample.1"),
            ("shortcut", "downsample.0"),
            ("conv#.norm", "bn#"),
            ("conv#", "conv#"),
        )
    ),
)
_FASTER_RCNN: tuple[Rule, ...] = (
    *_BODY,
    *_neck(2),
    ("proposal_generator.rpn_head.conv.*", "rpn.conv.*"),
    ("proposal_generator.rpn_head.objectness_logits.*", "rpn.objectness.*"),
    ("proposal_generator.rpn_head.anchor_deltas.*", "rpn.deltas.*"),
    *(rule for n in range(4) for rule in _blocks(f"roi_heads.box_head.conv{n + 1}", f"head.convs.{n}")),
    ("roi_heads.box_head.fc1.*", "head.fc.*"),
    ("roi_heads.box_head.fc2.*", "head.extra_fcs.0.*"),
    ("roi_heads.box_predictor.cls_score.*", "class_predictor.*"),
    ("roi_heads.box_predictor.bbox_pred.*", "box_predictor.*"),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "mask-rcnn": (
        *_FASTER_RCNN,
        *(rule for n in range(8) for rule in _blocks(f"roi_heads.mask_head.mask_fcn{n + 1}", f"mask_head.convs.{n}")),
        ("roi_heads.mask_head.deconv.*", "mask_head.upsample.*"),
        ("roi_heads.mask_head.predictor.*", "mask_predictor.*"),
    ),
    "faster-rcnn": _FASTER_RCNN,
    "retinanet": (
        *_BODY,
        *_neck(3),
        ("backbone.top_block.p#.*", "neck.pyramid.extra_blocks.p#.0.*"),
        *(
            (f"head.{theirs}_subnet.{2 * n}.*", f"head.{ours}_tower.{n}.0.*")
            for theirs, ours in (("cls", "class"), ("bbox", "box"))
            for n in range(8)
        ),
        ("head.cls_score.*", "class_predictor.*"),
        ("head.bbox_pred.*", "box_predictor.*"),
    ),
}
_MARKS = {"head.cls_subnet.": "retinanet", "roi_heads.mask_head.": "mask-rcnn", "roi_heads.box_head.": "faster-rcnn"}


def from_detectron2(tensors: Mapping[str, Tensor], style: str | None, file: Path) -> Renamed:
    """Return the state dict of a detector of detectron2 under our names.

    Args:
        style: see `STYLES`; None: the file must tell.

    Raises:
        WeightsError: no detector of ours can equal it, or its style is unknown.
    """
    family = value_of_mark(tensors, _MARKS)
    if family is None:
        raise WeightsError(f"{file}: none of detectron2's detectors that can be imported: {', '.join(RULES)}")
    left_out = {name: "mean and deviation of the pixels, which the first convolution takes in" for name in BUFFERS}
    left_out |= {name: "anchors, which are ours" for name in tensors if _ANCHORS in name}
    left_out = {name: why for name, why in left_out.items() if name in tensors}
    renamed, unknown = rename_all(tensors, RULES[family], left_out)
    _check_anchors(family, tensors, file)
    renamed, backbone = apply_style(renamed, style_of_detectron2(tensors, style, file), file)
    if family != "retinanet":
        return Renamed(family, renamed, unknown, left_out, backbone=backbone)
    for name in renamed:
        if name.startswith(("class_predictor.", "box_predictor.")):
            renamed[name] = _by_ratio(renamed[name])
    detector = {"extra_levels": find_extra_levels(renamed), "clip_before_nms": False}
    return Renamed(family, renamed, unknown, left_out, detector, backbone)


def _by_ratio(rows: Tensor) -> Tensor:
    """Return (9 * V, ...) rows of 9 anchors in our order, by ratio, then scale; detectron2 has the reverse."""
    if len(rows) % (_NUM_SCALES * _NUM_RATIOS):
        return rows  # other anchors: their shape is refused later
    return rows.unflatten(0, (_NUM_SCALES, _NUM_RATIOS, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def _check_anchors(family: str, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Make sure that the anchors in a file, which only older files hold, are ours."""
    grid = retinanet if family == "retinanet" else rpn
    for level, stride in enumerate(grid.STRIDES):
        ours = base_anchors(stride, grid.SCALES, grid.RATIOS)
        if family == "retinanet":
            ours = ours.unflatten(0, (_NUM_RATIOS, _NUM_SCALES)).transpose(0, 1).flatten(0, 1)
        for name, theirs in tensors.items():
            if name.endswith(f"{_ANCHORS}{level}") and (
                theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=0.01)
            ):
                raise WeightsError(f"{file}: has other anchors than ours ({name}); it would detect something else")
