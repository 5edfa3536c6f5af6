"""Settings that a checkpoint of mmdetection 2.x or 3.x keeps beside its tensors, as text of a Python config.

The text is parsed and never run. What neither names nor shapes of tensors tell stands in two tables: settings that our
detectors have too, and values without which they would detect something else.

Source: mmdetection 2.28 and 3.3; names and defaults only.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aligndet_cli.detectors import retinanet
from aligndet_cli.detectors.parts import roi_head, rpn, semantic_head
from aligndet_cli.detectors.parts.postprocess import LEAST_SOFT_SCORE
from aligndet_cli.detectors.parts.rcnn_config import DELTA_STDS
from aligndet_cli.errors import WeightsError

Tree = Mapping[str, Any]

# Their setting, by dotted path below `model`, and ours.
_NMS = {
    "test_cfg.score_thr": "score_threshold",
    "test_cfg.nms.iou_threshold": "nms_iou",
    "test_cfg.nms.iou_thr": "nms_iou",  # until 2.2
    "test_cfg.max_per_img": "max_detections",
}
_DENSE = {**_NMS, "test_cfg.nms_pre": "detections_per_level"}
_RCNN = {
    **{path.replace("test_cfg", "test_cfg.rcnn"): name for path, name in _NMS.items()},
    "test_cfg.rcnn.nms.type": "nms_type",
    "test_cfg.rpn.nms_pre": "test_proposals_per_level",
    "test_cfg.rpn.nms.iou_threshold": "rpn_nms_iou",
    "test_cfg.rpn.nms_thr": "rpn_nms_iou",  # these two until 2.5
    "test_cfg.rpn.max_num": "max_proposals",
    "test_cfg.rpn.max_per_img": "max_proposals",
    "roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": "roi_sampling_ratio",
    "roi_head.bbox_roi_extractor.roi_layer.aligned": "roi_aligned",
}
_ORDERS_2X = tuple(f"bbox_head.transformer.{part}.transformerlayers.operation_order" for part in ("encoder", "decoder"))
_HEADS_2X, _HEADS_3X = "bbox_head.transformer.encoder.transformerlayers.attn_cfgs", "encoder.layer_cfg.self_attn_cfg"
SHARED: dict[str, dict[str, str]] = {
    "retinanet": _DENSE,
    "fcos": _DENSE,
    "faster-rcnn": _RCNN,
    "mask-rcnn": _RCNN,
    "cascade-rcnn": _RCNN,
    "cascade-mask-rcnn": _RCNN,
    "htc": _RCNN,
    "detr": {
        "test_cfg.max_per_img": "max_detections",
        f"{_HEADS_2X}.num_heads": "num_heads",
        f"{_HEADS_2X}.0.num_heads": "num_heads",
        f"{_HEADS_3X}.num_heads": "num_heads",
    },
}
# Values that a setting of theirs must have, if it is there; the first is the usual one.
_COMMON: dict[str, tuple[Any, ...]] = {
    "backbone.strides": ([1, 2, 2, 2],),
    "backbone.dilations": ([1, 1, 1, 1],),
}
_PYRAMID: dict[str, tuple[Any, ...]] = {
    **_COMMON,
    "neck.type": ("FPN", "mmdet.FPN", "CBFPN"),
    "backbone.cb_del_stages": (1,),
    "neck.num_outs": (5,),
    "neck.upsample_cfg.mode": ("nearest",),
}
_BOXES, _ONES = "DeltaXYWHBBoxCoder", [1, 1, 1, 1]


def _coder(head: str, deviations: Sequence[float]) -> dict[str, tuple[Any, ...]]:
    """Return what the offsets of a head must mean; a loss of decoded boxes (`reg_decoded_bbox`) trains the same."""
    return {
        f"{head}.bbox_coder.type": (_BOXES,),
        f"{head}.bbox_coder.target_means": ([0, 0, 0, 0],),
        f"{head}.bbox_coder.target_stds": (deviations,),
        f"{head}.bbox_coder.add_ctr_clamp": (False,),
    }


_NEEDS_DENSE: dict[str, tuple[Any, ...]] = {
    **_PYRAMID,
    "neck.start_level": (1,),
    "bbox_head.loss_cls.use_sigmoid": (True,),
    "test_cfg.nms.type": ("nms",),
    "test_cfg.min_bbox_size": (0, -1),
}
_NEEDS_TWO_STAGE: dict[str, tuple[Any, ...]] = {
    **_PYRAMID,
    "neck.start_level": (0,),
    "neck.add_extra_convs": (False,),
    **_coder("rpn_head", _ONES),
    "rpn_head.loss_cls.use_sigmoid": (True,),
    "rpn_head.anchor_generator.scales": (list(rpn.SCALES),),
    "rpn_head.anchor_generator.ratios": (list(rpn.RATIOS),),
    "rpn_head.anchor_generator.strides": (list(rpn.STRIDES),),
    "roi_head.bbox_roi_extractor.type": ("SingleRoIExtractor",),
    "roi_head.bbox_roi_extractor.finest_scale": (roi_head.FINEST_SCALE,),
    "roi_head.bbox_roi_extractor.featmap_strides": (list(roi_head.POOLED_STRIDES),),
    "roi_head.bbox_roi_extractor.roi_layer.type": ("RoIAlign",),
    "roi_head.mask_roi_extractor.roi_layer.type": ("RoIAlign",),
    "roi_head.mask_roi_extractor.roi_layer.output_size": (14,),
    "test_cfg.rpn.nms.type": ("nms",),
    "test_cfg.rpn.nms_across_levels": (False,),
    "test_cfg.rpn.min_bbox_size": (0, -1),
    "test_cfg.rcnn.nms.type": ("nms", "soft_nms"),
    "test_cfg.rcnn.nms.method": ("linear",),
    "test_cfg.rcnn.nms.min_score": (LEAST_SOFT_SCORE,),
    "test_cfg.rcnn.mask_thr_binary": (0.5,),
}
_NEEDS_RCNN: dict[str, tuple[Any, ...]] = {
    **_NEEDS_TWO_STAGE,
    **_coder("roi_head.bbox_head", list(DELTA_STDS[0])),
    "roi_head.bbox_head.loss_cls.use_sigmoid": (False,),
}
_NEEDS_CASCADE: dict[str, tuple[Any, ...]] = {
    **_NEEDS_TWO_STAGE,
    # The last two are AlignDet's, in pre-training.
    "roi_head.type": ("CascadeRoIHead", "SelfSupHybridTaskCascadeRoIHead", "SelfSupCBv2Head"),
    "roi_head.num_stages": (len(DELTA_STDS),),
}
for number, deviations in enumerate(DELTA_STDS):
    _NEEDS_CASCADE |= {
        **_coder(f"roi_head.bbox_head.{number}", list(deviations)),
        f"roi_head.bbox_head.{number}.reg_class_agnostic": (True,),
        f"roi_head.bbox_head.{number}.loss_cls.use_sigmoid": (False,),
    }
_NEEDS_DETR: dict[str, tuple[Any, ...]] = {
    **_COMMON,
    "bbox_head.loss_cls.use_sigmoid": (False,),
    "bbox_head.positional_encoding.normalize": (True,),
    "bbox_head.positional_encoding.offset": (0,),
    _ORDERS_2X[0]: (["self_attn", "norm", "ffn", "norm"], ["norm", "self_attn", "norm", "ffn"]),
    _ORDERS_2X[1]: (
        ["self_attn", "norm", "cross_attn", "norm", "ffn", "norm"],
        ["norm", "self_attn", "norm", "cross_attn", "norm", "ffn"],
    ),
}
NEEDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "retinanet": {
        **_NEEDS_DENSE,
        **_coder("bbox_head", _ONES),
        "bbox_head.anchor_generator.octave_base_scale": (4,),
        "bbox_head.anchor_generator.scales_per_octave": (len(retinanet.SCALES),),
        "bbox_head.anchor_generator.ratios": (list(retinanet.RATIOS),),
        "bbox_head.anchor_generator.strides": (list(retinanet.STRIDES),),
    },
    "fcos": {
        **_NEEDS_DENSE,
        "neck.relu_before_extra_convs": (True,),
        "neck.add_extra_convs": ("on_output", True),  # until 2.8 True, and P5 by `extra_convs_on_inputs`
        "neck.extra_convs_on_inputs": (False,),
        "bbox_head.strides": (list(retinanet.STRIDES),),
        "bbox_head.centerness_on_reg": (False,),
        "bbox_head.norm_on_bbox": (False,),
    },
    "faster-rcnn": _NEEDS_RCNN,
    "mask-rcnn": _NEEDS_RCNN,
    "cascade-rcnn": _NEEDS_CASCADE,
    "cascade-mask-rcnn": _NEEDS_CASCADE,
    "htc": {
        **_NEEDS_CASCADE,
        "roi_head.type": ("HybridTaskCascadeRoIHead",),
        "roi_head.mask_info_flow": (True,),
        "roi_head.semantic_fusion": (["bbox", "mask"],),
        "roi_head.semantic_head.type": ("FusedSemanticHead",),
        "roi_head.semantic_head.fusion_level": (semantic_head.PLACE,),
        "roi_head.semantic_roi_extractor.type": ("SingleRoIExtractor",),
        "roi_head.semantic_roi_extractor.featmap_strides": ([roi_head.SEMANTIC_STRIDE],),
        "roi_head.semantic_roi_extractor.roi_layer.type": ("RoIAlign",),
        "roi_head.semantic_roi_extractor.roi_layer.output_size": (roi_head.SEMANTIC_POOL_SIZE,),
        "roi_head.semantic_roi_extractor.roi_layer.sampling_ratio": (0,),
    },
    "detr": _NEEDS_DETR,
}


def parse_config(meta: Tree) -> Tree:
    """Return the variables of the config in a checkpoint's meta data; empty if it has none that can be read."""
    text = meta.get("config") or meta.get("cfg")  # of 2.x, of 3.x
    if isinstance(text, Mapping):
        return text
    try:
        statements = ast.parse(str(text or "")).body
        return {
            target.id: _value(statement.value)
            for statement in statements
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _value(node: ast.expr) -> Any:
    """Return a literal as a value, `dict(...)` as a mapping, and anything else as its text."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_value(key): _value(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(part) for part in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def model_of(config: Tree) -> Tree:
    """Return the settings of the detector; AlignDet keeps them in those of its pretext, as `backbone`."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        return {}
    inner = model.get("backbone")
    if isinstance(inner, Mapping) and "backbone" in inner:
        model = inner
    # Until 2.3 test_cfg was a variable of its own.
    return {**({"test_cfg": config["test_cfg"]} if "test_cfg" in config else {}), **model}


def told_settings(family: str, model: Tree, file: Path) -> dict[str, Any]:
    """Return our settings that follow from those of a detector in mmdetection.

    Raises:
        WeightsError: a setting has a value that our detector cannot have; the message names it.
    """
    for path, values in NEEDS[family].items():
        given = at(model, path)
        if given is not None and not any(_is_same(given, value) for value in values):
            raise WeightsError(
                f"{file}: has {path} = {_said(given)}, our {family} has {_said(values[0])}; it would detect something "
                "else"
            )
    told = {name: value for path, name in SHARED[family].items() if (value := at(model, path)) is not None}
    norms_first = {order[0] == "norm" for path in _ORDERS_2X if (order := at(model, path)) is not None}
    if len(norms_first) > 1:
        raise WeightsError(
            f"{file}: has norms first in one of {' and '.join(_ORDERS_2X)}, our detr in both or none; it would detect "
            "something else"
        )
    if norms_first:
        told["pre_norm"] = norms_first.pop()
    return told | (_extra_levels(model, file) if family == "retinanet" else {})


def _extra_levels(model: Tree, file: Path) -> dict[str, str]:
    """Return the origin of RetinaNet's P6 and P7; nothing if the config does not tell."""
    asked, has_relu = at(model, "neck.add_extra_convs"), at(model, "neck.relu_before_extra_convs") or False
    if asked is None:
        return {}
    is_output = asked == "on_output" or (asked is True and at(model, "neck.extra_convs_on_inputs") is False)
    levels = {(False, False): "from_c5", (False, True): "from_c5_relu", (True, True): "from_p5"}
    if asked not in (True, "on_input", "on_output") or (is_output, has_relu) not in levels:
        relu = "with" if has_relu else "without"
        raise WeightsError(
            f"{file}: has neck.add_extra_convs = {_said(asked)} {relu} a ReLU before P7, which our retinanet has not; "
            "it would detect something else"
        )
    return {"extra_levels": levels[is_output, has_relu]}


def at(tree: Any, path: str) -> Any:
    """Return the value at a dotted path, in which numbers are places in lists; None if it is not there."""
    for part in path.split("."):
        if isinstance(tree, Mapping):
            tree = tree.get(part)
        elif isinstance(tree, Sequence) and not isinstance(tree, str) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


def mappings_in(tree: Any) -> Iterator[Tree]:
    """Yield all groups of settings in a config, outer ones first."""
    if isinstance(tree, Mapping):
        yield tree
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    for part in parts:
        yield from mappings_in(part)


def test_size(config: Tree) -> tuple[int, int] | None:
    """Return short and long side of test images in pixels; None if the config does not tell, or has several."""
    pipeline = config.get("test_pipeline") or at(config, "data.test.pipeline")
    scales = [group[key] for group in mappings_in(pipeline) for key in ("img_scale", "scale") if key in group]
    if len(scales) != 1 or not isinstance(scales[0], list | tuple) or len(scales[0]) != 2:
        return None
    sides = sorted(side for side in scales[0] if type(side) is int and side >= 32)
    return (sides[0], sides[1]) if len(sides) == 2 else None


def class_names(meta: Tree) -> tuple[str, ...] | None:
    """Return the names of the classes, which 3.x keeps in `dataset_meta`; None if the file does not tell."""
    data = meta.get("dataset_meta")
    places = (meta, data) if isinstance(data, Mapping) else (meta,)
    found = next((place[key] for place in places for key in ("CLASSES", "classes") if place.get(key)), None)
    if isinstance(found, str):
        return (found,)
    return tuple(map(str, found)) if isinstance(found, Sequence) else None


def _is_same(given: Any, value: Any) -> bool:
    if isinstance(value, list):
        return isinstance(given, list | tuple) and list(given) == value
    return type(given) in (int, float) and given == value if type(value) in (int, float) else bool(given == value)


def _said(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
