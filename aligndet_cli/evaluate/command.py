"""The command `aligndet evaluate`: help and flags."""

from aligndet_cli.files import read_json
from aligndet_cli.flags import CONTROL, DATA, DEVICES, LAYOUTS, PRECISION, setting
from aligndet_cli.stage import Read, Stage, data_words
from aligndet_cli.tables import rows_for_people
from aligndet_cli.workspace import Artifact, Workspace

RUN = setting("--run", "run", runs="finetune/*")
SIZES = (
    setting("--batch-size", "batch_size"),
    setting("--short-side", "short_side"),
    setting("--long-side", "long_side"),
)


def _headline(artifact: Artifact) -> str:
    rows = [(name, text) for name, text in rows_for_people(artifact.result) if "AP" in name]
    return ", ".join(f"{name} {text}" for name, text in rows) or "not measurable"


def _go_on(artifact: Artifact, workspace: Workspace) -> list[str]:
    """Compare with the newest other evaluation of the same images, or see what the detector finds elsewhere."""
    data = artifact.manifest["inputs"].get("data")
    others = [other for other in workspace.artifacts("evaluate") if other.manifest["inputs"].get("data") == data]
    others = [other for other in others if other.name != artifact.name]
    if not others:
        return ["predict", "IMAGES"]
    if any(artifact.folder.glob("plots/compare-*")):  # compared already
        return ["report", "--html"]
    config = artifact.config()
    words = ["evaluate", *data_words(artifact, workspace), "--run", read_json(artifact.folder / "metrics.json")["run"]]
    words += [] if config["data"].get("split") is None else ["--split", config["data"]["split"]]
    words += ["--weights", "best"] if config.get("weights") == "best" else []
    return [*words, "--compare", others[-1].name]


STAGE = Stage(
    name="evaluate",
    summary="Measure a fine-tuned detector.",
    data=f"{LAYOUTS} with labels (the data of training).",
    examples=(
        "aligndet evaluate",
        "aligndet evaluate --run with --compare without",
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
    headline=_headline,
    look_at=("plots", "predictions.json"),
    go_on=_go_on,
    reads=(Read("finetune", "weights", "run"),),
    purpose="val",
)
