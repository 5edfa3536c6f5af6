"""The command `aligndet finetune`: help and flags."""

import json

from aligndet_cli import flags
from aligndet_cli.flags import setting
from aligndet_cli.stage import Read, Stage, data_words
from aligndet_cli.tables import percent
from aligndet_cli.workspace import Artifact, Workspace


def _headline(artifact: Artifact) -> str:
    best = artifact.result.get("best")
    if best is not None:
        return f"best {best['metric']} {percent(best['value'])} at step {best['step']}"
    log = artifact.folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []  # imported runs have none
    losses = [
        sum(value for name, value in json.loads(line).items() if name.startswith("loss_"))
        for line in lines[:1] + lines[-1:]
    ]
    return f"loss {losses[1]:.3g} (at the start {losses[0]:.3g})" if losses else "imported"


def _go_on(artifact: Artifact, workspace: Workspace) -> list[str]:
    from aligndet_cli.config import DataConfig
    from aligndet_cli.data.open import has_split_for

    data = DataConfig.model_validate(artifact.config().get("data", {}))
    if data.root is not None and data.annotations is None and not has_split_for("val", data):
        return ["predict", "IMAGES"]
    words = ["evaluate", *data_words(artifact, workspace)]
    newest = workspace.find("finetune")
    return words if newest is None or newest.name == artifact.name else [*words, "--run", artifact.name]


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
    headline=_headline,
    look_at=("plots/curves.png", "weights.pt", "best.pt"),
    go_on=_go_on,
    reads=(Read("pretrain-box", "weights", "init"), Read("pretrain-image", "weights", "backbone.weights")),
)
