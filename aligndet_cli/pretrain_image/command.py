"""The command `aligndet pretrain-image`: help and flags."""

from aligndet_cli.flags import BACKBONE, BACKBONE_WEIGHTS, CONTROL, DATA, DEVICES, LAYOUTS, SPEED, TRAINING, setting
from aligndet_cli.stage import Read, Stage

STAGE = Stage(
    name="pretrain-image",
    summary="Train a backbone on images, without labels or with one class per folder.",
    data=f"{LAYOUTS}, any folder of images, or one folder of images per class.",
    examples=(
        "aligndet pretrain-image photos/",
        "aligndet pretrain-image objects/ --method supervised --backbone resnet18",
        "aligndet pretrain-image photos/ --method moco-v2 --epochs 100",
    ),
    flags=(
        setting("--method", "method"),
        BACKBONE,
        *BACKBONE_WEIGHTS,
        setting("--image-size", "image_size"),
        *TRAINING,
        *DATA,
        *CONTROL,
        *DEVICES,
        *SPEED,
    ),
    reads=(Read("pretrain-image", "backbone weights", "backbone.weights"),),
    remembers_data="never",  # these images are often others than those with the objects
)
