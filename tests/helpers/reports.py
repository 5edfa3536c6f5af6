"""Artifacts with nothing in them but what reports read."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aligndet_cli.training.recipe import SINGLE_SCALE, WIDE_SIDES

_clock = itertools.count(1000)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned run; the defaults are a COCO run of the paper with all images."""

    name: str
    init: str = "backbone"
    label: str | None = None
    detector: str = "retinanet"
    backbone: str = "resnet50"
    backbone_weights: str = "IMAGENET1K_V1"
    weights: str = "imagenet"  # hash of what it began with
    seed: int = 0
    fraction: float = 100.0
    fold: int = 1
    images: int = 117_266
    steps: int = 90_000
    batch_size: int = 16
    load_modules: tuple[str, ...] = ("backbone", "neck", "rpn", "head")
    trained_on: str = "supervised"
    protocol: dict[str, Any] = field(default_factory=dict)  # what is not as in the paper


def protocol_of(run: Tuned) -> dict[str, Any]:
    """That of table 2 for a supervised ResNet-50, and DETR's crops."""
    drops = {12_000: (0.75, 11 / 12), 90_000: (2 / 3, 82.5 / 90)}.get(run.steps, (2 / 3, 11 / 12))
    is_detr = run.detector == "detr"
    usual = {
        "backbone_weights": run.trained_on,
        "recipe": "default",
        "batch_size": run.batch_size,
        "steps": run.steps,
        "drop_steps": [round(drop * run.steps) for drop in ((0.8,) if is_detr else drops)],
        "policy": "detr" if is_detr else "resize",
        "short_sides": list(WIDE_SIDES if is_detr else SINGLE_SCALE),
        "long_side": 1333,
    }
    return {**usual, **run.protocol}


def put(
    folder: Path, content_hash: str, config: dict[str, Any], inputs: dict[str, str], result: dict[str, Any]
) -> None:
    folder.mkdir(parents=True)
    manifest = {"content_hash": content_hash, "inputs": inputs, "result": result, "finished": str(next(_clock))}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps(config))


def add_tuned(workspace: Path, run: Tuned) -> str:
    """Its content hash."""
    config = {
        "label": run.label,
        "seed": run.seed,
        "fraction": run.fraction,
        "fold": run.fold,
        "load_modules": run.load_modules,
        "detector": {"family": run.detector},
        "backbone": {"name": "resnet50", "weights": run.backbone_weights},
        "data": {"root": "/data/coco", "annotations": None},
        "training": {"schedule": None, "epochs": None, "batch_size": run.batch_size},
    }
    result: dict[str, Any] = {"init": run.init, "images": run.images, "steps": run.steps, "backbone": run.backbone}
    result["protocol"] = protocol_of(run)
    content_hash = f"{run.name}-{next(_clock)}"
    put(workspace / "finetune" / run.name, content_hash, config, {"data": "coco", "weights": run.weights}, result)
    return content_hash


def add_evaluated(workspace: Path, run: Tuned, *values: float | None, images: int = 5000, split: str = "val") -> None:
    """A run with AP, AP50 and AP75 (those that are given)."""
    evaluate_tuned(workspace, run.name, add_tuned(workspace, run), *values, images=images, split=split)


def evaluate_tuned(
    workspace: Path,
    name: str,
    content_hash: str,
    *values: float | None,
    images: int = 5000,
    split: str = "val",
    measured_with: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
) -> None:
    """An evaluation of a run with AP, AP50 and AP75 (those that are given)."""
    numbers = dict(zip(("AP", "AP50", "AP75"), (*values, None, None), strict=False))
    config = {"data": {"root": "/data/coco", "annotations": None, "split": None}, "short_side": None, "long_side": None}
    place = workspace / "evaluate" / f"{name}-val"
    inputs = {"data": "val", "weights": content_hash, **(inputs or {})}
    put(place, "measured", {**config, **(measured_with or {})}, inputs, {**numbers, "images": images})
    (place / "metrics.json").write_text(json.dumps({**numbers, "APs": 0.125, "run": name, "split": split}))


def add_pretrained(workspace: Path, name: str, *, content_hash: str, steps: int = 87_950, **changes: Any) -> None:
    """A pre-training run on COCO; 87,950 steps of 16 are 12 epochs."""
    config = {
        "tasks": "both",
        "freeze_backbone": True,
        "detector": {"family": "retinanet"},
        "backbone": {"name": "resnet50", "weights": "IMAGENET1K_V1"},
        "training": {"batch_size": 16},
        **changes,
    }
    put(
        workspace / "pretrain-box" / name,
        content_hash,
        config,
        {},
        {"steps": steps, "images": 117_266, "verdict": "healthy"},
    )


def add_imported(workspace: Path, name: str, *, layout: str, epochs: int | None, detector: dict[str, Any]) -> None:
    """A detector that another program has pre-trained; its hash is its name."""
    config = {"layout": layout, "detector": detector, "backbone": {"name": "resnet50", "weights": "none"}}
    result = {"init": "import", **({} if epochs is None else {"epochs": epochs})}
    put(workspace / "pretrain-box" / name, name, config, {"backbone weights": "none"}, result)
