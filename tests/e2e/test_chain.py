"""All stages in order with the fewest words, on every label format and on real images."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.commandline import CHAIN, RANDOM, SMALL, aligndet, run_chain

pytestmark = pytest.mark.e2e

RETINANET = ("--detector", "retinanet", "--backbone", "resnet18")


def pycocotools_numbers(labels: Path | dict[str, Any], predictions: Path) -> list[float]:
    """The 12 numbers, from the files alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO() if isinstance(labels, dict) else COCO(str(labels))
        if isinstance(labels, dict):
            truth.dataset = labels
            truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(number) for number in evaluation.stats]


def check_metrics(folder: Path, labels: Path | dict[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation are those of its predictions, by pycocotools and the labels as they came."""
    metrics = json.loads((folder / "metrics.json").read_text())
    expected = pycocotools_numbers(labels, folder / "predictions.json")
    for number, value in zip(("AP", "AP50", "AP75"), expected[:3], strict=True):
        assert metrics[number] == pytest.approx(value, abs=1e-12), number
    values = [value for value in metrics.values() if isinstance(value, float)]
    for value in expected:  # all twelve, whatever they are called
        assert value == -1 or any(abs(value - mine) < 1e-12 for mine in values), value
    return metrics


def check_status(workspace: Path, stages: tuple[str, ...]) -> None:
    """Every stage is complete and says what it was made from."""
    rows = aligndet("status", "-w", workspace, "--json").json()["runs"]
    assert [row["stage"] for row in rows] == list(stages)
    assert all(row["state"] == "complete" for row in rows)
    assert all(row["made_from"] for row in rows[1:]) and rows[0]["made_from"] == []


def test_coco(chain: Path, toy: Path) -> None:
    folder = chain / "evaluate" / "retinanet-resnet18-val"
    metrics = check_metrics(folder, toy / "annotations" / "instances_val.json")
    predictions = json.loads((folder / "predictions.json").read_text())
    assert len(predictions) > 50 and metrics["counts"]["predictions"] == len(predictions)
    # The toy set's category ids have gaps: what is predicted are ids, not positions.
    assert {entry["category_id"] for entry in predictions} <= {2, 3, 5, 7, 11}
    check_status(chain, tuple(CHAIN))


def toy_labels(toy: Path, split: str) -> Iterator[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """Image file, its entry and its annotations, with names instead of category ids."""
    content = json.loads((toy / "annotations" / f"instances_{split}.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    for image in content["images"]:
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        yield toy / split / image["file_name"], image, [{**entry, "name": names[entry["category_id"]]} for entry in own]


def as_voc(toy: Path, root: Path) -> Path:
    """The toy set as a VOC root. VOC counts pixels from 1 and includes the last one."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        stems = []
        for file, image, boxes in toy_labels(toy, split):
            stems.append(f"{split}-{file.stem}")
            shutil.copy(file, root / "JPEGImages" / f"{stems[-1]}.jpg")
            objects = ""
            for entry in boxes:
                x, y, width, height = entry["bbox"]
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
                box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
                objects += f"<object><name>{entry['name']}</name><bndbox>{box}</bndbox></object>"
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
            (root / "Annotations" / f"{stems[-1]}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return root


def as_yolo(toy: Path, root: Path) -> Path:
    """The toy set as a YOLO root: class, centre and size as shares of the image."""
    names = ["disc", "square", "triangle", "star", "cross"]
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for file, image, boxes in toy_labels(toy, split):
            shutil.copy(file, root / "images" / split / file.name)
            lines = []
            for entry in boxes:
                x, y, width, height = entry["bbox"]
                shares = (x + width / 2) / image["width"], (y + height / 2) / image["height"]
                sides = width / image["width"], height / image["height"]
                lines.append(" ".join(map(str, (names.index(entry["name"]), *shares, *sides))))
            (root / "labels" / split / f"{file.stem}.txt").write_text("\n".join(lines))
    lines = "\n".join(f"  {number}: {name}" for number, name in enumerate(names))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{lines}\n")
    return root


@pytest.mark.parametrize("convert", [as_voc, as_yolo])
def test_other_formats(convert: Any, toy: Path, chain: Path, tmp_path: Path) -> None:
    """The same images and boxes in another form go through the same stages to the same detector."""
    root, workspace = convert(toy, tmp_path / "data"), tmp_path / "w"
    stages = ("proposals", "pretrain-box", "finetune", "evaluate")
    # VOC has multi-scale defaults of its own, but the chain names its resolution.
    run_chain(root, workspace, *stages)
    check_status(workspace, stages)
    original, converted = (json.loads(next(w.glob("proposals/*/report.json")).read_text()) for w in (chain, workspace))
    assert original["labels"]["all"]["objects"] == converted["labels"]["all"]["objects"]
    (folder,) = (workspace / "evaluate").iterdir()
    truth = json.loads((folder / "ground_truth.json").read_text())
    metrics = check_metrics(folder, truth)
    assert metrics["counts"]["images"] == 11
    assert ("voc" in metrics) == (convert is as_voc)
    expected = sorted(tuple(entry["bbox"]) for _, _, boxes in toy_labels(toy, "val") for entry in boxes)
    found = sorted(tuple(entry["bbox"]) for entry in truth["annotations"])
    assert len(found) == len(expected)
    assert (
        max(abs(a - b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)) < 0.01
    )


def run_on_real_data(data: Path, workspace: Path) -> Path:
    """Four commands, made small by flags; returns the evaluation."""
    few = ("-w", workspace, "--limit", "16")
    aligndet("proposals", data, *few, "--set", "working_size=96", "--num-workers", "2")
    aligndet("pretrain-box", *RETINANET, *RANDOM, "-w", workspace, *SMALL)
    aligndet("finetune", *RETINANET, *few, *SMALL, "--set", "detector.score_threshold=0.005")
    aligndet("evaluate", *few)
    check_status(workspace, ("proposals", "pretrain-box", "finetune", "evaluate"))
    (folder,) = (workspace / "evaluate").iterdir()
    assert json.loads((folder / "predictions.json").read_text())
    return folder


def test_minicoco(shared_data: Path, tmp_path: Path) -> None:
    folder = run_on_real_data(shared_data / "minicoco", tmp_path / "w")
    labels = json.loads((shared_data / "minicoco" / "annotations" / "instances_val2017.json").read_text())
    labels["images"] = labels["images"][:16]
    kept = {image["id"] for image in labels["images"]}
    labels["annotations"] = [entry for entry in labels["annotations"] if entry["image_id"] in kept]
    metrics = check_metrics(folder, labels)
    assert metrics["counts"]["images"] == 16


def test_bccd(shared_data: Path, tmp_path: Path) -> None:
    folder = run_on_real_data(shared_data / "bccd" / "BCCD", tmp_path / "w")
    metrics = check_metrics(folder, json.loads((folder / "ground_truth.json").read_text()))
    assert metrics["split"] == "test" and {"AP07", "AP12"} <= metrics["voc"].keys()
