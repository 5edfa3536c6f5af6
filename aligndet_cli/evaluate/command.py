"""The command `aligndet evaluate`: help and flags."""

from aligndet_cli.flags import CONTROL, DATA, DEVICES, LAYOUTS, PRECISION, setting
from aligndet_cli.stage import Read, Stage

RUN = setting("--run", "run", runs="finetune/*")
SIZES = (
    setting("--batch-size", "batch_size"),
    setting("--short-side", "short_side"),
    setting("--long-side", "long_side"),
)
STAGE = Stage(
    name="evaluate",
    summary="Measure a fine-tuned detector.",
    data=f"{LAYOUTS} with labels (the data of training).",
    examples=(
        "aligndet evaluate",
        "aligndet evaluate --run retinanet-resnet50 --compare retinanet-resnet50-backbone",
        "aligndet evaluate coco/ --split val2017 --fail-under 0.36",
    ),
    flags=(
        RUN,
        setting("--weights", "weights"),
        setting("--metric", "metric"),
        setting("--compare", "compare", runs="evaluate/* finetune/*"),
        setting("--fail-under", "fail_under"),
        *SIZES,
        *DATA,
        *CONTROL,
        *DEVICES,
        PRECISION,
    ),
    reads=(Read("finetune", "weights", "run"),),
    purpose="val",
)
