"""Names of facebookresearch/detr, whose `detr_resnet50` and `detr_resnet101` weights are published."""

from aligndet_cli.tools.conversion.rules import Rule

RULES: tuple[Rule, ...] = (
    ("backbone.0.body.*", "backbone.*"),
    ("input_proj.*", "neck.*"),
    ("query_embed.*", "query_embedding.*"),
    ("class_embed.*", "class_predictor.*"),
    ("bbox_embed.layers.0.*", "box_tower.0.*"),
    ("bbox_embed.layers.1.*", "box_tower.2.*"),
    ("bbox_embed.layers.2.*", "box_predictor.*"),
    ("transformer.*", "transformer.*"),
)
