"""`aligndet demo`: run the whole method, and measure the effect of box-domain pre-training.

On drawn pictures, or on a labelled data set of the user's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from aligndet_cli.config import Sources
from aligndet_cli.data.toy import draw_toy_data, draw_toy_objects
from aligndet_cli.driver import Outcome, Request, execute
from aligndet_cli.logs import logger
from aligndet_cli.tables import percent, plain_table
from aligndet_cli.tools.figures.command import write_figures
from aligndet_cli.tools.report.collect import METRICS, collect_report
from aligndet_cli.tools.report.html import write_page
from aligndet_cli.tools.study.quick.backbone import find_backbone
from aligndet_cli.tools.study.quick.data import open_labelled
from aligndet_cli.tools.study.quick.fit import AFTER_PRETRAINING, finetune_steps, fit_settings, is_gpu
from aligndet_cli.workspace import Workspace

LABELLED_PERCENT = 5  # of the training pictures; nobody has labelled the others
STARTS = {"backbone only": "backbone", "AlignDet": "pretrain"}
FINETUNE_LR = {"backbone": 0.02, "pretrain": 0.03}  # half as much again after pre-training, as the paper does
LABELLED_PHOTOS = 30  # of the user's, at least
PHOTO_CLUSTERS = 16
PHOTO_STEPS = 400  # of pre-training
PHOTO_LR = {"backbone": 0.01, "pretrain": 0.01 * AFTER_PRETRAINING}  # the middle one of a quick study's
_DETECTOR = "retinanet"
_Stage = Callable[..., Outcome]  # name of a stage and settings as after `--set` -> what came of it


@dataclass(frozen=True)
class DemoSize:
    """Numbers of pictures, and settings of the stages as after `--set`, with spaces between.

    Nothing is downloaded, so the demo makes its own backbone first. The detector is slim and runs are short: norms in
    neck and head, larger learning rates, and a momentum that starts lower.
    """

    num_objects: int = 4800
    num_train: int = 480
    num_val: int = 96
    num_clusters: int = 16
    backbone: str = (
        "method=supervised backbone.name=resnet18 image_size=64 min_area=1.0 training.steps=450 training.batch_size=16"
    )
    model: str = (
        "backbone.name=resnet18 detector.neck_channels=64 detector.head_convs=2 detector.neck_norm=group "
        "detector.head_norm=group training.batch_size=8"
    )
    pretrain: str = (
        "topk=15 momentum=0.98 training.steps=450 training.lr=0.03 views.short_side=[128,144,160] views.long_side=224 "
        "detector.pretext_samples=256"
    )
    finetune: str = (
        f"fraction={LABELLED_PERCENT} backbone.frozen_stages=4 backbone.norm_eval=true training.steps=120 "
        "resolution.short_side=[160] resolution.long_side=224"
    )


FULL_SIZE = DemoSize()


@dataclass(frozen=True)
class DemoReport:
    """Metrics without and with pre-training, and the page with all pictures."""

    without: dict[str, float]
    with_pretraining: dict[str, float]
    page: Path

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        delta = {key: self.with_pretraining[key] - self.without[key] for key in METRICS}
        return {"without": self.without, "with": self.with_pretraining, "delta": delta, "report": str(self.page)}

    def table(self) -> Table:
        """Return a table of AP in percent: without, with, and the difference."""
        table = plain_table("", *METRICS)
        numbers = self.to_json()
        for title, key in zip((*STARTS, "delta"), ("without", "with", "delta"), strict=True):
            sign = "+" if key == "delta" else ""
            table.add_row(title, *(percent(numbers[key][metric], sign) for metric in METRICS))
        return table


def run_demo(folder: Path, *, seed: int, size: DemoSize = FULL_SIZE) -> DemoReport:
    """Draw data, run all stages, and measure with and without pre-training; a second call resumes or returns at once.

    The backbone learns from pictures of single objects and their classes, neck and head from pictures of many objects
    without labels. Fine-tuning takes a few labelled pictures of many objects.

    Raises:
        AlignDetError: any error of a stage.
    """
    objects, scenes = folder / f"toy-objects-{seed}", folder / f"toy-{seed}"
    if not (objects / "done").exists():
        logger.info(f"drawing {size.num_objects} pictures of single objects into {objects}")
        draw_toy_objects(objects, seed=seed, num_train=size.num_objects, num_val=size.num_objects // 12)
        (objects / "done").touch()
    if not (scenes / "annotations" / "instances_val.json").exists():
        logger.info(f"drawing {size.num_train} + {size.num_val} pictures of many objects into {scenes}")
        draw_toy_data(scenes, seed=seed, num_train=size.num_train, num_val=size.num_val)
    workspace = Workspace(folder / f"workspace-{seed}")

    def stage(name: str, *settings: str, data: Path = scenes) -> Outcome:
        flags = {"data.root": ("DATA", data), "seed": ("--seed", seed)}
        return execute(Request(name, workspace, Sources(None, settings, flags)))

    stage("pretrain-image", *size.backbone.split(), data=objects)
    stage("proposals")
    numbers = (f"k={size.num_clusters}", f"pca_dim={size.num_clusters}", "short_side=160", "long_side=224")
    stage("cluster", *numbers, "backbone.name=resnet18")
    stage("pretrain-box", *size.model.split(), *size.pretrain.split())

    def slim(name: str, *settings: str) -> Outcome:
        return stage(name, *((*size.model.split(), *size.finetune.split()) if name == "finetune" else ()), *settings)

    return _with_and_without(slim, workspace, FINETUNE_LR)


def run_photo_demo(
    folder: Path, data: Path, *, seed: int, backbone: str | None, weights: str | None, offline: bool = False
) -> DemoReport:
    """Tell the same story on a labelled data set: some 30 of its images keep their labels, the others lose them.

    Backbone and settings are found as for `aligndet study --quick`.

    Raises:
        AlignDetError: no labels, no weights of a backbone, or any error of a stage.
    """
    photos = open_labelled(data)
    workspace = Workspace(folder / f"photos-{data.absolute().name}-{seed}")
    name, file = find_backbone(backbone, weights, workspace, offline=offline, is_gpu=is_gpu())
    percent = min(math.ceil(100 * LABELLED_PHOTOS / photos.num_train), 100)
    num_labelled = int(percent / 100 * photos.num_train)
    logger.info(f"{photos.describe()}; {num_labelled} of them keep their labels")
    logger.info(f"{_DETECTOR} on {name}, weights {file}")
    tables = fit_settings(photos, _DETECTOR, name, file)
    tables["pretrain-box"]["training.steps"] = PHOTO_STEPS
    tables["finetune"] |= {"training.steps": finetune_steps(num_labelled), "fraction": float(percent)}
    held_out = workspace.root / "held-out"
    photos.write_held_out(held_out)
    places = photos.held_out_settings(held_out)
    model = {key: value for key, value in tables["common"].items() if not key.startswith("backbone.")}
    network = {"backbone.name": name, "backbone.weights": str(file)}
    views = tables["pretrain-box"]
    sides = {"short_side": max(views["views.short_side"]), "long_side": views["views.long_side"]}
    own = {
        "proposals": tables.get("proposals", {}),
        "cluster": {**network, **sides, "k": PHOTO_CLUSTERS, "pca_dim": PHOTO_CLUSTERS},
        "pretrain-box": {**model, **network, **views},
        "finetune": {**model, **network, **tables["finetune"]},
        "evaluate": tables["evaluate"],
    }

    def stage(name: str, *settings: str) -> Outcome:
        values = {**places.get("common", {}), **places.get(name, {}), **own[name], "data.root": data, "seed": seed}
        return execute(Request(name, workspace, Sources(None, settings, {k: ("demo", v) for k, v in values.items()})))

    for name in ("proposals", "cluster", "pretrain-box"):
        stage(name)
    return _with_and_without(stage, workspace, PHOTO_LR)


def _with_and_without(stage: _Stage, workspace: Workspace, rates: Mapping[str, float]) -> DemoReport:
    """Fine-tune and evaluate without and with the pre-training, draw the figures, and write the page.

    Args:
        rates: learning rates by start.
    """
    metrics = []
    comparison: tuple[str, ...] = ()
    for label, init in STARTS.items():
        run = stage("finetune", f"init={init}", f"label={label}", f"training.lr={rates[init]}").folder.name
        evaluation = stage("evaluate", f"run={run}", "batch_size=8", *comparison)
        assert evaluation.artifact is not None, "a stage that is done has an artifact"
        metrics.append({key: float(evaluation.artifact.result[key] or 0.0) for key in METRICS})
        comparison = (f"compare={run}",)
    without, with_pretraining = metrics
    write_figures(workspace)
    return DemoReport(without, with_pretraining, write_page(workspace, collect_report(workspace)))
