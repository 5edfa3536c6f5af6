"""The command `aligndet cluster`: help and flags."""

from aligndet_cli.flags import BACKBONE, BACKBONE_WEIGHTS, CONTROL, DATA, DEVICES, setting
from aligndet_cli.stage import Read, Stage

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
    reads=(Read("proposals", "proposals", "proposals"), Read("pretrain-image", "weights", "backbone.weights")),
)
