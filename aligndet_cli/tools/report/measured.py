"""Evaluated runs, and the settings in which they can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligndet_cli.artifacts.starts import Start
from aligndet_cli.data.findings import counted
from aligndet_cli.files import read_json
from aligndet_cli.tools.report.numbers import numbers_of
from aligndet_cli.tools.report.published import Published, find_published
from aligndet_cli.workspace import Artifact


@dataclass(frozen=True, order=True)
class Setting:
    """The properties that runs share if they can be compared; tables are sorted by them.

    Attributes:
        data: name of the labelled data set.
        evaluated: split that was measured.
        fraction: percent of the labelled images.
        num_images: number of labelled images; 0 for imported runs, where it is unknown.
        content: hashes of the training and the test data, and the test resolution, if it is not that of training.
    """

    data: str
    evaluated: str
    detector: str
    backbone: str
    schedule: str
    fraction: float
    num_images: int
    content: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """A fine-tuned and evaluated run.

    Attributes:
        start: what it started from; its label names the row.
        pair: fold (None with all images) and seed; runs of two starts with the same pair are compared.
        num_images: number of images that were measured.
        numbers: metrics in 0..1 by name; None if one cannot be measured, and without those that were not.
        backbone_weights: hash and short name of its backbone's first weights; None if unknown.
    """

    setting: Setting
    start: Start
    pair: tuple[int | None, int]
    num_images: int
    numbers: dict[str, float | None]
    name: str
    backbone_weights: tuple[str, str] | None
    finished: str
    published: Published | None
    pretraining: Artifact | None
    tuned: Artifact


def measure(
    evaluation: Artifact, run: Artifact, start: Start, pretraining: Artifact | None, metrics: Sequence[str]
) -> Measured:
    """Return what an evaluation has measured of a fine-tuned run."""
    config, measured_with = run.config(), evaluation.config()
    sides = [f"{name} side {side}" for name in ("short", "long") if (side := measured_with[f"{name}_side"])]
    split = read_json(evaluation.folder / "metrics.json").get("split") or measured_with["data"]["split"] or "val"
    is_imported = "training" not in config  # its training is unknown
    is_best = measured_with.get("weights") == "best"
    fraction = 100.0 if is_imported else float(config["fraction"])
    setting = Setting(
        detector=config["detector"]["family"],
        backbone=run.result.get("backbone") or config["backbone"]["name"],
        schedule="as imported" if is_imported else _schedule(config, run),
        data=_data_name(measured_with if is_imported else config),
        evaluated=f"{split}, best weights" if is_best else str(split),
        fraction=fraction,
        num_images=0 if is_imported else int(run.result["images"]),
        content=(
            run.manifest["inputs"].get("data", ""),
            evaluation.manifest["inputs"]["data"],
            ", ".join(sides),
        ),
    )
    return Measured(
        setting=setting,
        start=start,
        pair=(None if fraction == 100 else int(config["fold"]), int(config["seed"])),
        num_images=int(evaluation.result["images"]),
        numbers=numbers_of(evaluation, metrics),
        name=run.name,
        backbone_weights=_backbone_weights(run, start.kind, pretraining),
        finished=str(evaluation.manifest["finished"]),
        published=find_published(evaluation, run, pretraining),
        pretraining=pretraining,
        tuned=run,
    )


def _backbone_weights(run: Artifact, kind: str, pretraining: Artifact | None) -> tuple[str, str] | None:
    source = run if kind == "backbone" else pretraining
    key = "weights" if kind == "backbone" else "backbone weights"
    if source is None or key not in source.manifest["inputs"]:
        return None
    config = source.config()
    file = Path(config["backbone"].get("weights", "") if "training" in config else "imported")
    return str(source.manifest["inputs"][key]), file.parent.name if file.name == "weights.pt" else file.stem


def set_apart(runs: list[Measured]) -> list[Measured]:
    """Tell settings apart that are not the same but have the same words: backbone's weights, images, resolution."""
    return _apart_by_content(_apart_by_backbone(runs))


def _apart_by_content(runs: list[Measured]) -> list[Measured]:
    alike: dict[Setting, list[Measured]] = {}
    for run in runs:
        alike.setdefault(replace(run.setting, content=()), []).append(run)
    told = []
    for run in runs:
        others = alike[replace(run.setting, content=())]
        labels, images, sides = ({other.setting.content[place] for other in others} for place in range(3))
        data, evaluated = run.setting.data, run.setting.evaluated
        if len(labels) > 1:
            data += f", labels {run.setting.content[0][:6]}"
        if len(images) > 1:
            counts = {(other.setting.content[1], other.num_images) for other in others}
            is_told = len({count for _, count in counts}) == len(images)
            evaluated += f", {run.num_images} images" + ("" if is_told else f" {run.setting.content[1][:6]}")
        if len(sides) > 1 and run.setting.content[2]:
            evaluated += f", {run.setting.content[2]}"
        told.append(replace(run, setting=replace(run.setting, data=data, evaluated=evaluated)))
    return told


def _apart_by_backbone(runs: list[Measured]) -> list[Measured]:
    """Add the name of the backbone's weights to the settings of runs that differ in nothing else."""
    found: dict[tuple[Any, ...], set[str]] = {}
    for run in runs:
        if run.backbone_weights is not None:
            found.setdefault((run.setting, run.start.label, run.pair), set()).add(run.backbone_weights[0])
    mixed = {setting for (setting, _, _), hashes in found.items() if len(hashes) > 1}
    return [
        replace(run, setting=replace(run.setting, backbone=f"{run.setting.backbone}, {run.backbone_weights[1]}"))
        if run.setting in mixed and run.backbone_weights is not None
        else run
        for run in runs
    ]


def _schedule(config: dict[str, Any], run: Artifact) -> str:
    """Return the length of a training, with the batch size if it is not the paper's."""
    training = config["training"]
    own = counted(run.result["steps"], "step") if training["epochs"] is None else counted(training["epochs"], "epoch")
    length = training["schedule"] or own
    return length if training["batch_size"] == 16 else f"{length} of {training['batch_size']}"


def _data_name(config: dict[str, Any]) -> str:
    data = config["data"]
    return Path(data["root"] or data["annotations"] or "data").stem
