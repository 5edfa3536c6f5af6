"""Names of torchvision's modules that, with our weights, compute the same as ours.

The modules are `BackboneWithFPN` (`backbone.`), `RPNHead`, `FastRCNNConvFCHead`, `FastRCNNPredictor`, `MaskRCNNHeads`,
`MaskRCNNPredictor`, `RetinaNetHead` and `FCOSClassificationHead`. A whole detector computes the same only with
torchvision's settings, which imported runs have: by default, ours differ in anchors, RoIAlign and post-processing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aligndet_cli.detectors import DetectorConfig, neck_norm_of
from aligndet_cli.detectors.checkpoint import DetectorFile
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.detectors.parts.rcnn_config import RCNNConfig
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.tools.conversion.rules import Rule, translate

_BODY: tuple[Rule, ...] = (("backbone.body.*", "backbone.*"),)
_PYRAMID: tuple[Rule, ...] = (
    *_BODY,
    ("backbone.fpn.inner_blocks.#.*", "neck.pyramid.inner_blocks.#.*"),
    ("backbone.fpn.layer_blocks.#.*", "neck.pyramid.layer_blocks.#.*"),
)
_FASTER_RCNN: tuple[Rule, ...] = (
    *_PYRAMID,
    ("rpn.head.conv.0.0.*", "rpn.conv.*"),
    ("rpn.head.conv.1.0.*", "rpn.extra_convs.0.*"),
    ("rpn.head.cls_logits.*", "rpn.objectness.*"),
    ("rpn.head.bbox_pred.*", "rpn.deltas.*"),
    ("roi_heads.box_head.#.#.*", "head.convs.#.#.*"),
    ("roi_heads.box_predictor.cls_score.*", "class_predictor.*"),
    ("roi_heads.box_predictor.bbox_pred.*", "box_predictor.*"),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "retinanet": (
        *_PYRAMID,
        ("head.classification_head.conv.#.#.*", "head.class_tower.#.#.*"),
        ("head.classification_head.cls_logits.*", "class_predictor.*"),
        ("head.regression_head.conv.#.#.*", "head.box_tower.#.#.*"),
        ("head.regression_head.bbox_reg.*", "box_predictor.*"),
    ),
    "fcos": (*_PYRAMID, ("head.classification_head.cls_logits.*", "class_predictor.*")),
    "faster-rcnn": _FASTER_RCNN,
    "mask-rcnn": (
        *_FASTER_RCNN,
        ("roi_heads.mask_head.#.#.*", "mask_head.convs.#.#.*"),
        ("roi_heads.mask_predictor.conv5_mask.*", "mask_head.upsample.*"),
        ("roi_heads.mask_predictor.mask_fcn_logits.*", "mask_predictor.*"),
    ),
    "detr": _BODY,
}
# Torchvision's background comes first, and has boxes and masks that are never used.
_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "class_predictor": lambda rows: torch.cat([rows[-1:], rows[:-1]]),
    "box_predictor": lambda rows: torch.cat([rows.new_zeros(4, *rows.shape[1:]), rows]),
    "mask_predictor": lambda rows: torch.cat([rows.new_zeros(1, *rows.shape[1:]), rows]),
}


def to_torchvision(content: DetectorFile) -> tuple[dict[str, Tensor], list[str], str]:
    """Return a state dict under torchvision's names, our names that have no place there, and how to load it."""
    family = content.detector.family
    rules = (*_rules_by_settings(content.detector), *RULES[family])
    renamed: dict[str, Tensor] = {}
    left_out = []
    for name, tensor in content.state_dict.items():
        theirs = translate(name, rules, to_ours=False)
        if theirs is None:
            left_out.append(name)
            continue
        reorder = _ROWS.get(name.partition(".")[0]) if family in ("faster-rcnn", "mask-rcnn") else None
        renamed[theirs] = reorder(tensor).contiguous() if reorder else tensor
        if family == "fcos" and theirs.startswith("head.classification_head.conv.") and tensor.dim() == 4:
            renamed[theirs.replace(".weight", ".bias")] = tensor.new_zeros(len(tensor))  # before a norm, there
    return renamed, left_out, _usage(content)


def _rules_by_settings(detector: DetectorConfig) -> list[Rule]:
    """Return rules that depend on settings: numbers that count other modules than ours, and modules of other kinds."""
    rules: list[Rule] = []
    if isinstance(detector, FCOSConfig) and detector.head_norm == "group":  # convolution, norm and ReLU are counted
        for index in range(detector.head_convs):
            for part in (0, 1):
                theirs = f"head.classification_head.conv.{3 * index + part}.*"
                rules.append((theirs, f"head.class_tower.{index}.{part}.*"))
    has_relu = isinstance(detector, FCOSConfig) or (
        isinstance(detector, RetinaNetConfig) and detector.extra_levels != "from_c5"
    )
    if has_relu and neck_norm_of(detector) == "none":
        rules += [(f"backbone.fpn.extra_blocks.p{n}.*", f"neck.pyramid.extra_blocks.p{n}.0.*") for n in (6, 7)]
    if isinstance(detector, RCNNConfig) and is_of_torchvision(detector) and not detector.head_convs:  # TwoMLPHead
        rules += [("roi_heads.box_head.fc6.*", "head.fc.*"), ("roi_heads.box_head.fc7.*", "head.extra_fcs.0.*")]
    elif isinstance(detector, RCNNConfig):  # convolutions, flattening, layer, ReLU, layer
        first = detector.head_convs + 1
        rules += [(f"roi_heads.box_head.{first}.*", "head.fc.*")]
        rules += [(f"roi_heads.box_head.{first + 2}.*", "head.extra_fcs.0.*")]
    return rules


def is_of_torchvision(detector: DetectorConfig) -> bool:
    """Return True if a detector has torchvision's settings, so that torchvision's detector computes the same."""
    return isinstance(detector, RCNNConfig | RetinaNetConfig) and detector.anchors == "torchvision"


def _usage(content: DetectorFile) -> str:
    family, norm = content.detector.family, neck_norm_of(content.detector)
    if family == "detr":
        return f"torchvision has no DETR: this is the body of its {content.backbone.name}, as backbone.body.*"
    if is_of_torchvision(content.detector):
        is_soft = content.detector.model_dump().get("nms_type") == "soft_nms"
        nms = "; its NMS is not soft, and so its detections differ" if is_soft else ""
        return f"torchvision: load_state_dict of the same detector there, with as many classes{nms}"
    layer = {"batch": ", norm_layer=nn.BatchNorm2d", "group": ", norm_layer=partial(nn.GroupNorm, 32)"}.get(str(norm))
    classes = {"retinanet": "RetinaNet", "fcos": "FCOS", "faster-rcnn": "FasterRCNN", "mask-rcnn": "MaskRCNN"}
    return (
        f"torchvision: backbone.* is a BackboneWithFPN(...{layer or ''}), the rest the heads of a {classes[family]}; "
        "what torchvision does around them (anchors, pooling, post-processing) differs, and so do its detections"
    )
