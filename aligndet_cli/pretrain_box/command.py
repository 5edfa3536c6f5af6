"""The command `aligndet pretrain-box`: help and flags."""

from aligndet_cli import flags
from aligndet_cli.flags import setting
from aligndet_cli.stage import Read, Stage

STAGE = Stage(
    name="pretrain-box",
    summary="Pre-train a detector's neck and head on the proposals.",
    data="The images of the proposals, where they have moved since.",
    examples=(
        "aligndet pretrain-box --detector retinanet --backbone-weights DEFAULT",
        "aligndet pretrain-box --detector faster-rcnn --backbone-weights moco.pth --devices 2",
        "aligndet pretrain-box --detector detr --backbone-weights DEFAULT --dry-run",
    ),
    flags=(
        flags.DETECTOR,
        flags.BACKBONE,
        *flags.BACKBONE_WEIGHTS,
        setting("--topk", "topk"),
        setting("--limit-boxes", "limit_boxes"),
        setting("--temperature", "temperature"),
        setting("--momentum", "momentum"),
        setting("--tasks", "tasks"),
        setting("--freeze-backbone/--no-freeze-backbone", "freeze_backbone"),
        flags.RECIPE,
        *flags.TRAINING,
        setting("--short-side", "views.short_side"),
        setting("--long-side", "views.long_side"),
        *flags.DATA,
        *flags.CONTROL,
        *flags.DEVICES,
        *flags.SPEED,
    ),
    reads=(
        Read("proposals", "proposals", "proposals"),
        Read("cluster", "clusters", "clusters"),
        Read("pretrain-image", "backbone weights", "backbone.weights"),
    ),
)
