"""`finetune --evaluate-every`: says what `evaluate` would say, and checks before the first step what it would check."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from helpers.commandline import BACKBONE, RESOLUTION, aligndet
from helpers.data_sets import voc_xml

pytestmark = pytest.mark.e2e

FINETUNE = ("finetune", *BACKBONE, *RESOLUTION, "--batch-size", "4", "--steps", "2", "--init", "scratch")
SMALL = ("--set", "detector.neck_channels=32", "--set", "detector.score_threshold=0.005", "--evaluate-every", "1")


@pytest.fixture
def data(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy set, to be changed."""
    return Path(shutil.copytree(toy, tmp_path / "toy"))


def change_labels(data: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the validation labels."""
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def to_voc(toy: Path, root: Path) -> Path:
    """Write the toy set as VOC."""
    for split in ("train", "val"):
        images = open_images(DataConfig(root=toy, split=split), purpose="train")
        stems = []
        for index in range(len(images)):
            record = images.record(index)
            stems.append(f"{split}{record.path.stem}")
            target = root / "JPEGImages" / f"{stems[-1]}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(record.path, target)
            names = [images.categories[class_id].name for class_id in record.class_ids]
            boxes = zip(names, record.boxes.astype(int).tolist(), strict=True)
            (root / "Annotations").mkdir(exist_ok=True)
            objects = ((name, (x1 + 1, y1 + 1, x2, y2)) for name, (x1, y1, x2, y2) in boxes)
            xml = voc_xml(*objects, size_hw=record.size_hw)
            (root / "Annotations" / f"{stems[-1]}.xml").write_text(xml)
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))
    return root


@pytest.mark.parametrize(("detector", "kind"), [("retinanet", "coco"), ("mask-rcnn", "coco"), ("retinanet", "voc")])
def test_the_last_numbers_are_those_of_evaluate(data: Path, tmp_path: Path, detector: str, kind: str) -> None:
    # What pycocotools alone cannot take.
    change_labels(data, lambda content: content["annotations"][0].update(id="first", area=None))
    root = data if kind == "coco" else to_voc(data, tmp_path / "voc")
    aligndet(*FINETUNE, root, "-w", tmp_path / "w", "--detector", detector, *SMALL)
    aligndet("evaluate", "-w", tmp_path / "w", "--set", "plots=false")
    (log,) = (tmp_path / "w" / "finetune").glob("*/metrics.jsonl")
    last = next(entry for entry in map(json.loads, reversed(log.read_text().splitlines())) if "AP" in entry)
    (file,) = (tmp_path / "w" / "evaluate").glob("*/metrics.json")
    metrics = json.loads(file.read_text())
    wanted = {key: metrics[key] for key in ("AP", "AP50", "AP75")}
    if detector == "mask-rcnn":
        wanted["mask_AP"] = metrics["segm"]["AP"]
    if kind == "voc":
        wanted["AP12"] = metrics["voc"]["AP12"]
    assert {key: last[key] for key in wanted} == wanted and wanted["AP"] > 0
    best = json.loads(log.with_name("manifest.json").read_text())["result"]["best"]
    name, value = ("VOC AP12", wanted["AP12"]) if kind == "voc" else ("AP", wanted["AP"])
    assert best == {"step": last["step"], "metric": name, "value": value}


BREAKAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "other ids": (
        lambda c: (
            [entry.update(id=entry["id"] + 1) for entry in c["categories"]]
            and [entry.update(category_id=entry["category_id"] + 1) for entry in c["annotations"]]
        ),
        "classes differ from those of run",
    ),
    "a class is missing": (lambda c: c["categories"].append({"id": 99, "name": "yeti"}), "missing in the run"),
    "another name": (lambda c: c["categories"][0].update(name="yeti"), "'yeti' in the data"),
    "an odd box": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "'bbox' [1, 2, 3]"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_labels_that_evaluate_refuses_are_refused_before_the_first_step(data: Path, tmp_path: Path, name: str) -> None:
    words = (*FINETUNE, data, "-w", tmp_path / "w", "--detector", "retinanet")
    aligndet(*words)
    change, message = BREAKAGES[name]
    change_labels(data, change)
    line = aligndet(*words, *SMALL, "--name", "two", "--dry-run", code=3).error_line()
    assert message in line
    assert (
        aligndet("evaluate", "-w", tmp_path / "w", code=3).error_line().replace("retinanet-resnet18-scratch", "two")
        == line
    )
