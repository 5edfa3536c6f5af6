"""The command `aligndet cluster`: help and flags."""

from aligndet_cli.flags import BACKBONE, BACKBONE_WEIGHTS, CONTROL, DATA, DEVICES, setting
from aligndet_cli.stage import Read, Stage, backbone_words, same_backbone_words
from aligndet_cli.workspace import Artifact, Workspace


def _headline(artifact: Artifact) -> str:
    result = artifact.result
    share = result.get("explained_by_clusters")  # clusters of a file have none
    explained = "" if share is None else f" that explain {share:.1%} of the variance"
    return f"{result['num_proposals']:,} boxes in {result['k']} clusters{explained}, {result['dead_clusters']} empty"


def _go_on(artifact: Artifact, workspace: Workspace) -> list[str]:
    config = artifact.config()
    if config.get("import_file") is not None:  # no backbone took part
        return ["pretrain-box", "--detector", "detr", *backbone_words(workspace)]
    return ["pretrain-box", "--detector", "detr", *same_backbone_words(config["backbone"])]


STAGE = Stage(
    name="cluster",
    summary="Group the proposals into pseudo classes (needed by DETR only).",
    data="The images of the proposals, where they have moved since.",
    examples=(
        "aligndet cluster --backbone-weights DEFAULT",
        "aligndet cluster --backbone resnet18 --backbone-weights DEFAULT --k 64",
        "aligndet cluster --import classes.json",
    ),
    flags=(
        setting("--k", "k"),
        setting("--pca-dim", "pca_dim"),
        setting("--import", "import_file"),
        BACKBONE,
        *BACKBONE_WEIGHTS,
        setting("--batch-size", "batch_size"),
        setting("--short-side", "short_side"),
        setting("--long-side", "long_side"),
        *DATA,
        *CONTROL,
        *DEVICES,
    ),
    headline=_headline,
    look_at=("sheet.jpg", "report.json"),
    go_on=_go_on,
    reads=(Read("proposals", "proposals", "proposals"), Read("pretrain-image", "weights", "backbone.weights")),
)
