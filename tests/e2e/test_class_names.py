"""Class names that look like marks, are equal, or break a line, in every command that shows or counts classes."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aligndet_cli.data.dataset import class_labels
from aligndet_cli.detectors.checkpoint import read_detector
from helpers.commandline import CHAIN, aligndet

pytestmark = pytest.mark.e2e

# Each is a class of one data set; at least the first box of each image is of another one.
NAMES = (
    *("N/A", "", " ", "background", "missed", "all classes", "None", "null", "cat", "cat", "cat (id 9)"),
    *("two\nlines", "tab\there", "\r", "a,b;c", 'it\'s "quoted"', "a/b", "a_b", "..", "../up", "con."),
    *("猫", "собака", "قط", "🐱", "\u2028", "\ud800", "x" * 300, "x" * 299 + "y", "\n" * 300, "🐱" * 300),
    *("$x$", "$\\frac{$", "$", "_hidden", "__ignore__", "a_b^2", "%s %d {0} {name}", "\\", "\\n", "two\\nlines"),
    *("[red]", "[/]", "[bold]x[/bold]\\", ":cat:", "<b>", "<script>alert(1)</script>", "&amp;", "a|b", "**a**", "`a`"),
)
IDS = {place + 1: name for place, name in enumerate(NAMES)}


def write_data(root: Path, names: dict[int, str]) -> Path:
    """Write twelve images to train on and to validate, with five boxes each; the classes take turns."""
    for split in ("train", "val"):
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": number, "name": name} for number, name in names.items()]
        (root / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        for image_id in range(1, 13):
            Image.new("RGB", (96, 64), (20 * image_id, 90, 10 * len(split))).save(root / split / f"{image_id}.png")
            content["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": 64, "width": 96})
            for place in range(5):
                number = len(content["annotations"])
                entry = {"id": number + 1, "image_id": image_id, "category_id": number % len(names) + 1}
                content["annotations"].append({**entry, "bbox": [3 + 18 * place, 5 + image_id, 15, 30], "iscrowd": 0})
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def run(data: Path, workspace: Path, said: list[str]) -> dict[str, Any]:
    """Fine-tune, evaluate and predict; return what they found, without names, and note what they said."""
    finetune = (*CHAIN["finetune"], "--init", "scratch", "--backbone-weights", "none", "--evaluate-every", "3")
    said.append(aligndet("finetune", data, "-w", workspace, *finetune, "--name", "run").stderr)
    said.append(aligndet("evaluate", data, "-w", workspace).stderr)
    words = (data / "val", "-w", workspace, "--score", "0", "--save-crops", "--json")
    predicted = aligndet("predict", *words)
    said.append(predicted.stderr)
    (folder,) = (workspace / "evaluate").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = read_detector(workspace / "finetune/run/weights.pt").state_dict
    return {
        "weights": {name: value.numpy().tobytes() for name, value in weights.items()},
        "predictions": (folder / "predictions.json").read_text(),
        "per_class": [{key: value for key, value in entry.items() if key != "name"} for entry in metrics["per_class"]],
        "predicted": json.loads((workspace / "predict/run/predictions.json").read_text())["annotations"],
        "counts": list(predicted.json()["per_class"].values()),
    }


@pytest.fixture(scope="module")
def odd(module_folder: Path) -> tuple[Path, Path, dict[str, Any], list[str]]:
    root = module_folder
    said: list[str] = []
    data = write_data(root / "data", IDS)
    return data, root / "workspace", run(data, root / "workspace", said), said


def test_names_change_nothing_but_names(odd, tmp_path: Path) -> None:
    plain = run(write_data(tmp_path / "data", {number: f"class {number}" for number in IDS}), tmp_path / "w", [])
    for key, value in odd[2].items():
        assert value == plain[key], key


def test_nothing_is_left_undrawn(odd) -> None:
    _, workspace, _, said = odd
    assert "was not drawn" not in "".join(said)
    assert len(list(workspace.glob("evaluate/*/plots/*.png"))) == 6
    assert len(list((workspace / "predict/run/images").iterdir())) == 12


def test_names_are_kept_as_they_are(odd) -> None:
    _, workspace, _, _ = odd
    for file in (*workspace.glob("evaluate/*/ground_truth.json"), workspace / "predict/run/predictions.json"):
        categories = json.loads(file.read_text())["categories"]
        assert {entry["id"]: entry["name"] for entry in categories} == IDS
    assert {one.category_id: one.name for one in read_detector(workspace / "finetune/run/weights.pt").categories} == IDS


def test_every_class_has_crops_of_its_own(odd) -> None:
    _, workspace, found, _ = odd
    with_crops = {entry["category_id"] for entry in found["predicted"] if min(entry["bbox"][2:]) >= 1}
    folders = [folder.name for folder in (workspace / "predict/run/crops").iterdir()]
    assert len(folders) >= len(with_crops) > 20
    assert all(len(name.encode()) <= 255 and name == name.strip(" .") for name in folders)


def test_doctor_and_report_show_each_class_by_its_label(odd, tmp_path: Path) -> None:
    data, workspace, _, _ = odd
    labels = class_labels(IDS)
    ran = aligndet("doctor", data, "--json").json()
    assert list(ran["summary"]["splits"]["val"]["boxes_per_class"]) == list(labels.values())
    assert sum(ran["summary"]["splits"]["val"]["boxes_per_class"].values()) == 60
    warnings = [item["message"] for item in ran["findings"] if item["code"] == "equal-class-names"]
    assert len(warnings) == 2 and "classes 9 and 10 are both called 'cat':" in warnings[0]
    assert "both called 'cat'" in aligndet("doctor", data).stdout
    aligndet("report", "-w", workspace, "--html", "-o", tmp_path / "page.html")
    page = html.unescape((tmp_path / "page.html").read_text())
    assert [label for label in labels.values() if label not in page] == []
    assert "<script>alert" not in (tmp_path / "page.html").read_text()
