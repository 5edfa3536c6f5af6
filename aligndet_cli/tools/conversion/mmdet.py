"""Names of mmdetection 2.x and, but for DETR, 3.x, which the authors' AlignDet checkpoints have too.

Their values mean the same as ours in the same order, so renaming is enough, both ways.

Source: mmdetection 2.28 and liming-ai/AlignDet; names and shapes only.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from aligndet_cli.tools.conversion.rules import Rule, rename_all, translate


def _blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Return rules of a convolution and its norm, `bn` or `gn`; on the way back `to_mmdet` chooses."""
    return (
        (f"{theirs}.conv.*", f"{ours}.0.*"),
        (f"{theirs}.bn.*", f"{ours}.1.*"),
        (f"{theirs}.gn.*", f"{ours}.1.*"),
    )


_BACKBONE: tuple[Rule, ...] = (("backbone.*", "backbone.*"),)
_NECK = (
    *_blocks("neck.lateral_convs.#", "neck.pyramid.inner_blocks.#"),
    *_blocks("neck.fpn_convs.#", "neck.pyramid.layer_blocks.#"),
)
_DENSE = (
    *_BACKBONE,
    *_blocks("neck.fpn_convs.3", "neck.pyramid.extra_blocks.p6"),
    *_blocks("neck.fpn_convs.4", "neck.pyramid.extra_blocks.p7"),
    *_NECK,
    *_blocks("bbox_head.cls_convs.#", "head.class_tower.#"),
    *_blocks("bbox_head.reg_convs.#", "head.box_tower.#"),
)


def _rcnn(number: str) -> tuple[Rule, ...]:
    """Return the rules of an R-CNN without masks, whose heads' names have a number behind them or, with "", none."""
    theirs = f"roi_head.bbox_head{number}"
    return (
        *_BACKBONE,
        *_NECK,
        ("rpn_head.rpn_conv.*", "rpn.conv.*"),
        ("rpn_head.rpn_cls.*", "rpn.objectness.*"),
        ("rpn_head.rpn_reg.*", "rpn.deltas.*"),
        *_blocks(f"{theirs}.shared_convs.#", f"head{number}.convs.#"),
        (f"{theirs}.shared_fcs.0.*", f"head{number}.fc.*"),
        (f"{theirs}.shared_fcs.1.*", f"head{number}.extra_fcs.0.*"),
        (f"{theirs}.fc_cls.0.*", f"projector{number}.hidden.*"),
        (f"{theirs}.fc_cls.2.*", f"projector{number}.output.*"),
        (f"{theirs}.fc_cls.*", f"class_predictor{number}.*"),
        (f"{theirs}.fc_reg.*", f"box_predictor{number}.*"),
    )


def _masks(number: str) -> tuple[Rule, ...]:
    """Return the rules of the mask heads; `number` as in `_rcnn`."""
    return (
        *_blocks(f"roi_head.mask_head{number}.convs.#", f"mask_head{number}.convs.#"),
        (f"roi_head.mask_head{number}.upsample.*", f"mask_head{number}.upsample.*"),
        (f"roi_head.mask_head{number}.conv_logits.*", f"mask_predictor{number}.*"),
    )


_DETR = (
    *_BACKBONE,
    ("bbox_head.input_proj.*", "neck.*"),
    ("bbox_head.query_embedding.*", "query_embedding.*"),
    ("bbox_head.fc_cls.*", "class_predictor.*"),
    ("bbox_head.reg_ffn.layers.0.0.*", "box_tower.0.*"),
    ("bbox_head.reg_ffn.layers.1.*", "box_tower.2.*"),
    ("bbox_head.fc_reg.*", "box_predictor.*"),
    ("bbox_head.projector.0.*", "projector.hidden.*"),
    ("bbox_head.projector.2.*", "projector.output.*"),
    ("bbox_head.transformer.decoder.post_norm.*", "transformer.decoder.norm.*"),
    ("bbox_head.transformer.encoder.post_norm.*", "transformer.encoder.norm.*"),
    *(
        (f"bbox_head.transformer.{part}.layers.#.{theirs}.*", f"transformer.{part}.layers.#.{ours}.*")
        for part in ("encoder", "decoder")
        for theirs, ours in (
            ("attentions.0.attn", "self_attn"),
            ("attentions.1.attn", "multihead_attn"),
            ("ffns.0.layers.0.0", "linear1"),
            ("ffns.0.layers.1", "linear2"),
            ("norms.0", "norm1"),
            ("norms.1", "norm2"),
            ("norms.2", "norm3"),
        )
    ),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "retinanet": (
        *_DENSE,
        ("bbox_head.retina_cls.0.*", "projector.hidden.*"),
        ("bbox_head.retina_cls.2.*", "projector.output.*"),
        ("bbox_head.retina_cls.*", "class_predictor.*"),
        ("bbox_head.retina_reg.*", "box_predictor.*"),
    ),
    "fcos": (
        *_DENSE,
        ("bbox_head.conv_cls.0.*", "projector.hidden.*"),
        ("bbox_head.conv_cls.2.*", "projector.output.*"),
        ("bbox_head.conv_cls.*", "class_predictor.*"),
        ("bbox_head.conv_reg.*", "box_predictor.sides.*"),
        ("bbox_head.conv_centerness.*", "box_predictor.centerness.*"),
        ("bbox_head.scales.#.scale", "head.scales.factors.#"),  # a tensor per level; ours is one (L,) tensor
    ),
    "faster-rcnn": _rcnn(""),
    "mask-rcnn": (*_rcnn(""), *_masks("")),
    "cascade-rcnn": _rcnn(".#"),
    "cascade-mask-rcnn": (*_rcnn(".#"), *_masks(".#")),
    "htc": (
        *_rcnn(".#"),
        *_masks(".#"),
        *_blocks("roi_head.mask_head.#.conv_res", "mask_flow.#"),
        *_blocks("roi_head.semantic_head.lateral_convs.#", "semantic_head.lateral_convs.#"),
        *_blocks("roi_head.semantic_head.convs.#", "semantic_head.convs.#"),
        *_blocks("roi_head.semantic_head.conv_embedding", "semantic_head.embedding"),
        ("roi_head.semantic_head.conv_logits.*", "semantic_head.logits.*"),
    ),
    "detr": _DETR,
}
MARKS = {
    "bbox_head.transformer.encoder.": "detr",
    "roi_head.mask_head.1.conv_res.": "htc",
    "roi_head.mask_head.0.": "cascade-mask-rcnn",
    "roi_head.bbox_head.0.": "cascade-rcnn",
    "roi_head.mask_head.convs.": "mask-rcnn",
    "rpn_head.rpn_conv.": "faster-rcnn",
    "bbox_head.scales.0.scale": "fcos",
    "bbox_head.cls_convs.": "retinanet",
}
DETR_3X = "encoder.layers.0.self_attn.attn."
_FACTORS = "head.scales.factors"


def from_mmdet(family: str, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict under our names, and the names that no detector of the family has."""
    renamed, unknown = rename_all(state_dict, RULES[family])
    levels = sorted(name for name in renamed if name.startswith(f"{_FACTORS}."))
    if levels:
        renamed[_FACTORS] = torch.stack([renamed.pop(name) for name in levels])
    return renamed, unknown


def to_mmdet(family: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict under mmdetection's names, and our names that have no place there."""
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        parts = {f"{name}.{level}": value for level, value in enumerate(tensor)} if name == _FACTORS else {name: tensor}
        for part, value in parts.items():
            theirs = translate(part, RULES[family], to_ours=False)
            if theirs is None:
                unknown.append(name)
            else:
                is_batch_norm = f"{name.rpartition('.')[0]}.running_mean" in tensors  # group norms have no statistics
                renamed[theirs if is_batch_norm else theirs.replace(".bn.", ".gn.")] = value
    return renamed, unknown
