"""The command `aligndet pretrain-image`: help and flags."""

from aligndet_cli.flags import BACKBONE, BACKBONE_WEIGHTS, CONTROL, DATA, DEVICES, LAYOUTS, SPEED, TRAINING, setting
from aligndet_cli.stage import Read, Stage, backbone_words
from aligndet_cli.workspace import Artifact, Workspace


def _headline(artifact: Artifact) -> str:
    result = artifact.result
    if "knn" in result:
        before = f" (at the start {result['knn_at_start']:.1%})" if "knn_at_start" in result else ""
        return f"{result['verdict']}, kNN accuracy {result['knn']:.1%}{before}"
    losses = [f", loss {value:.3g}" for name, value in result.items() if name.startswith("loss_")]
    return result["verdict"] + "".join(losses[:1])


def _go_on(_: Artifact, workspace: Workspace) -> list[str]:
    if workspace.find("proposals") is None:
        return ["proposals", "DATA"]
    return ["pretrain-box", *backbone_words(workspace)]


STAGE = Stage(
    name="pretrain-image",
    summary="Train a backbone on images: without labels, from a teacher, or with one class per folder.",
    data=f"{LAYOUTS}, any folder of images, or one folder of images per class.",
    examples=(
        "aligndet pretrain-image photos/",
        "aligndet pretrain-image objects/ --method supervised --backbone resnet18",
        "aligndet pretrain-image photos/ --method distill --teacher timm:vit_small_patch14_dinov2.lvd142m",
    ),
    flags=(
        setting("--method", "method"),
        setting("--teacher", "teacher"),
        BACKBONE,
        *BACKBONE_WEIGHTS,
        setting("--image-size", "image_size"),
        *TRAINING,
        *DATA,
        *CONTROL,
        *DEVICES,
        *SPEED,
    ),
    headline=_headline,
    look_at=("plots/curves.png", "weights.pt"),
    go_on=_go_on,
    reads=(Read("pretrain-image", "backbone weights", "backbone.weights"),),
    remembers_data="never",  # these images are often others than those with the objects
)
