"""Pushes a data set through all stages and returns its numbers in a form that two data sets can be compared by."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aligndet_cli.data.masks import encode_mask
from aligndet_cli.errors import DataError
from helpers.commandline import RANDOM, Ran, aligndet
from helpers.narrow import narrow_words
from helpers.oddities import coco_data, voc, yolo
from helpers.oddities.oddity import SIZE_HW, Change, Oddity

WRITERS: dict[str, Callable[[Path], None]] = {
    "coco": coco_data.write_coco,
    "voc": voc.write_voc,
    "yolo": yolo.write_yolo,
}
TWINS: dict[str, dict[str, Change]] = {"coco": coco_data.TWINS, "voc": voc.TWINS, "yolo": yolo.TWINS}
# Files of the validation split that oddities change.
OF_VALIDATION = {
    "coco": ("annotations/instances_val.json",),
    "voc": ("Annotations/d.xml", "ImageSets/Main/val.txt"),
    "yolo": ("labels/val/d.txt",),
}
# A picture that no oddity renames, for `predict`.
LAST_IMAGE = {"coco": "val/e.jpg", "voc": "JPEGImages/e.jpg", "yolo": "images/val/e.jpg"}

OF_BOXES = ("bbox", "area", "iscrowd")  # keys of an annotation that are compared
_HERE = ("--num-workers", "1")
_TRAINING = ("--short-side", "32", "--long-side", "48", "--steps", "1", "--num-workers", "0")
_ALL_AT_ONCE = ("--batch-size", "3")  # one step on all images, so that every label counts


def words_of(stage: str, detector: str) -> tuple[str, ...]:
    """Return what makes a stage as small as it can be, with `narrow_backbones`."""
    training = (*narrow_words(detector), *_TRAINING, *_ALL_AT_ONCE)
    score = ("--set", "detector.score_threshold=0.005")
    words = {
        "proposals": ("--set", "working_size=48", "--min-size", "8", *_HERE),
        "pretrain-box": (*training, *RANDOM),
        "finetune": (*training, *score, "--evaluate-every", "1"),
        "evaluate": ("--set", "plots=false"),
        "split": ("--fractions", "70", "--folds", "1"),
    }
    return words[stage]


def numbers_of(data: Path, workspace: Path, oddity: Oddity, *, is_whole: bool) -> dict[str, Any]:
    """Run the stages on a data set and return what they found, by stage; ids are left out, order counts.

    A stage that stops has its line in the place of its numbers, and the stages that need it are left out.

    Args:
        workspace: an empty place to write to.
        is_whole: run all stages; else those alone that read boxes.
    """
    folds = workspace / "split"
    found: dict[str, Any] = {
        "split": said_by("split", data, *words_of("split", oddity.detector), "--output", folds) or _folds(folds)
    }
    for stage in ("proposals", "pretrain-box", "finetune", "evaluate") if is_whole else ("finetune", "evaluate"):
        named = [] if stage == "pretrain-box" else [data]
        more = ("--init", "scratch") if stage == "finetune" and not is_whole else ()
        found[stage] = said_by(stage, *named, "-w", workspace, *words_of(stage, oddity.detector), *more)
        if found[stage]:
            return found
        found |= _READ[stage](_only(workspace / stage))
    watched, metrics = found["finetune --evaluate-every"], found["evaluate"]
    all_metrics = metrics | metrics.get("voc", {}) | {f"mask_{key}": n for key, n in metrics.get("segm", {}).items()}
    if watched != {key: all_metrics[key] for key in watched}:
        found["finetune --evaluate-every"] = f"two answers: {watched}"
    if is_whole:
        words = ("predict", data / LAST_IMAGE[oddity.format], "-w", workspace, "--score", "0", "--no-annotated")
        found["predict"] = said_by(*words) or _boxes_of(
            _only(workspace / "predict") / "predictions.json", "bbox", "score"
        )
    return found


def said_by(*words: str | Path) -> str:
    """Return the one line with which a command stops; "" if it does not, and else why it is no such line."""
    try:
        ran = aligndet(*words, code=None)
        if ran.code in (0, 3):
            return ran.error_line().removeprefix("error: ") if ran.code else ""
        return f"exit code {ran.code}: {ran.stderr}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"


def findings_of(ran: Ran) -> list[dict[str, Any]]:
    """Return the findings of `doctor --json`."""
    found: list[dict[str, Any]] = ran.json()["findings"]
    return found


def _only(folder: Path) -> Path:
    (inner,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return inner


def _read(file: Path) -> Any:
    return json.loads(file.read_text())


def _of_finetune(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    watched = {key: value for key, value in rows.pop().items() if key != "step"}
    return {"finetune": [_weights(folder), rows], "finetune --evaluate-every": watched}


def _of_evaluate(folder: Path) -> dict[str, Any]:
    truth, metrics = _read(folder / "ground_truth.json"), _read(folder / "metrics.json")
    for entry in [*metrics["per_class"], *metrics.get("voc", {}).get("per_class", [])]:
        del entry["category_id"], entry["name"]
    predictions = _without_ids(truth, _read(folder / "predictions.json"), "bbox", "score")
    return {
        "evaluate": metrics,
        "ground truth": _without_ids(truth, truth["annotations"], *OF_BOXES, "segmentation"),
        "predictions": predictions,
    }


def _of_proposals(folder: Path) -> dict[str, Any]:
    return {"proposals": [(folder / f"{name}.npy").read_bytes() for name in ("boxes", "offsets")]}


def _weights(folder: Path) -> str:
    """Return a hash of all tensors of `weights.pt`."""
    digest = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                walk(value[key])
        elif isinstance(value, torch.Tensor):
            digest.update(value.contiguous().numpy().tobytes())

    walk(torch.load(folder / "weights.pt", weights_only=True))
    return digest.hexdigest()


def _without_ids(labels: dict[str, Any], entries: list[dict[str, Any]], *keys: str) -> list[list[Any]]:
    """Return boxes with positions of image and category in place of ids, and the values of some keys."""
    images = {image["id"]: position for position, image in enumerate(labels["images"])}
    ids = sorted(category["id"] for category in labels["categories"])
    return [
        [
            images[entry["image_id"]],
            ids.index(entry["category_id"]),
            *(_drawn(entry.get(key)) if key == "segmentation" else entry[key] for key in keys),
        ]
        for entry in entries
    ]


def _drawn(segmentation: Any) -> Any:
    """Return the run-length code of a mask; None of one that cannot be drawn."""
    try:
        code = encode_mask(segmentation, SIZE_HW) if segmentation else None
    except DataError:
        return None
    return code and (code["counts"] if isinstance(code["counts"], str) else code["counts"].decode())


def _boxes_of(file: Path, *keys: str) -> list[list[Any]]:
    content = _read(file)
    return _without_ids(content, content["annotations"], *keys)


def _folds(folder: Path) -> list[list[list[Any]]]:
    return [_boxes_of(file, *OF_BOXES) for file in sorted(folder.iterdir())]


_READ: dict[str, Callable[[Path], dict[str, Any]]] = {
    "proposals": _of_proposals,
    "pretrain-box": lambda folder: {"pretrain-box": _weights(folder)},
    "finetune": _of_finetune,
    "evaluate": _of_evaluate,
}
