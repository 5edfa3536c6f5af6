"""The command `aligndet pretrain-box`: help and flags."""

from aligndet_cli import flags
from aligndet_cli.flags import setting
from aligndet_cli.stage import Read, Stage, detector_words
from aligndet_cli.workspace import Artifact, Workspace


def _headline(artifact: Artifact) -> str:
    result = artifact.result
    if "chance" not in result:  # the contrastive task was off, or another method has none
        losses = [
            f"{key.removeprefix('loss_')} {value:.2f}" for key, value in result.items() if key.startswith("loss_")
        ]
        return ", ".join([str(result.get("verdict", "imported")), *([f"losses {' '.join(losses)}"] if losses else [])])
    return f"{result['verdict']}, contrastive loss {result['loss_contrastive']:.2f} (by chance {result['chance']:.2f})"


def _go_on(artifact: Artifact, workspace: Workspace) -> list[str]:
    proposals = workspace.find("proposals")
    is_labelled = proposals is not None and "recall_at_iou_0.5" in proposals.result
    return ["finetune", *([] if is_labelled else ["DATA"]), *detector_words(artifact)]


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
        setting("--method", "method"),
        flags.DETECTOR,
        flags.BACKBONE,
        *flags.BACKBONE_WEIGHTS,
        setting("--topk", "topk"),
        setting("--limit-boxes", "limit_boxes"),
        setting("--temperature", "temperature"),
        setting("--momentum", "momentum"),
        setting("--tasks", "tasks"),
        setting("--objectness/--no-objectness", "objectness"),
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
    headline=_headline,
    look_at=("plots/curves.png", "plots/views.jpg", "weights.pt"),
    go_on=_go_on,
    reads=(
        Read("proposals", "proposals", "proposals"),
        Read("cluster", "clusters", "clusters"),
        Read("pretrain-image", "backbone weights", "backbone.weights"),
    ),
)
