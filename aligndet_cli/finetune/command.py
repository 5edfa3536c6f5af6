"""The command `aligndet finetune`: help and flags."""

from aligndet_cli import flags
from aligndet_cli.flags import setting
from aligndet_cli.stage import Read, Stage

STAGE = Stage(
    name="finetune",
    summary="Train the detector on labelled images.",
    data=f"{flags.LAYOUTS} with labels (the data of the proposals).",
    examples=(
        "aligndet finetune --detector retinanet",
        "aligndet finetune --detector retinanet --init backbone",
        "aligndet finetune labelled/ --fraction 10 --evaluate-every 1",
    ),
    flags=(
        flags.DETECTOR,
        flags.BACKBONE,
        *flags.BACKBONE_WEIGHTS,
        setting("--init", "init", words="pretrain backbone scratch", runs="pretrain-box/*/weights.pt"),
        setting("--label", "label"),
        setting("--load-modules", "load_modules"),
        setting("--min-match", "min_match"),
        setting("--fraction", "fraction"),
        setting("--fold", "fold"),
        setting("--evaluate-every", "evaluate_every"),
        setting("--early-stop", "early_stop"),
        setting("--ema", "ema"),
        flags.RECIPE,
        *flags.TRAINING,
        setting("--short-side", "resolution.short_side"),
        setting("--long-side", "resolution.long_side"),
        setting("--policy", "resolution.policy", words="auto"),
        *flags.DATA,
        *flags.CONTROL,
        *flags.DEVICES,
        *flags.SPEED,
    ),
    reads=(Read("pretrain-box", "weights", "init"), Read("pretrain-image", "weights", "backbone.weights")),
)
