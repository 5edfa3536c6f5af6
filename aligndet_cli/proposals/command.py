"""The command `aligndet proposals`: help and flags."""

from aligndet_cli.flags import CONTROL, DATA, LAYOUTS, MACHINE, WORKERS, setting
from aligndet_cli.stage import Read, Stage, backbone_words
from aligndet_cli.workspace import Artifact, Workspace


def _headline(artifact: Artifact) -> str:
    result = artifact.result
    recall = result.get("recall_at_iou_0.5")
    found = "" if recall is None else f"; they cover {recall:.1%} of the labelled objects (IoU 0.5)"
    return f"{result['proposals_per_image']:.1f} boxes per image in {result['images']:,} images{found}"


def _go_on(_: Artifact, workspace: Workspace) -> list[str]:
    return ["pretrain-box", *backbone_words(workspace)]


STAGE = Stage(
    name="proposals",
    summary="Find boxes of possible objects in unlabelled images.",
    data=f"{LAYOUTS}, or any folder of images.",
    examples=(
        "aligndet proposals coco/",
        "aligndet proposals photos/ --mode quality --max-per-image 200",
        "aligndet proposals coco/ --from-run faster-rcnn-resnet50",
    ),
    flags=(
        setting("--mode", "mode"),
        setting("--source", "source"),
        setting("--min-size", "min_size"),
        setting("--max-ratio", "max_ratio"),
        setting("--max-size", "max_size"),
        setting("--nms", "nms"),
        setting("--max-per-image", "max_per_image"),
        setting("--import", "import_file"),
        setting("--from-run", "from_run"),
        setting("--merge", "merge"),
        setting("--backbone", "cue_backbone"),
        setting("--backbone-weights", "cue_weights", words="auto workspace DEFAULT"),
        setting("--export", "export_file"),
        setting("--on-error", "on_error"),
        *DATA,
        *CONTROL,
        WORKERS,
        setting("--offline", "runtime.offline", MACHINE),
        setting("--shard", "shard", MACHINE),
        setting("--backend", "backend", MACHINE),
        setting("--scheduler", "scheduler", MACHINE),
    ),
    headline=_headline,
    look_at=("sheet.jpg", "plots"),
    go_on=_go_on,
    reads=(Read("pretrain-box", "run", "from_run"),),
    remembers_data="always",
)
