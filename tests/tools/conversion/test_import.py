"""`aligndet import-weights` and `export` on the command line, from file to run and back."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors.checkpoint import read_detector, write_detector
from aligndet_cli.detectors.interface import Detections
from aligndet_cli.detectors.results import predict_each
from aligndet_cli.errors import ConfigError, DataError, WeightsError
from aligndet_cli.metrics.measure import check_categories
from aligndet_cli.tools.conversion.categories import COCO, COCO_BY_ID, VOC, resolve_categories
from aligndet_cli.tools.conversion.exporting import mmdet_checkpoint
from helpers.commandline import aligndet
from helpers.small_detectors import detector_file

FILE = Path("some.pth")


def test_an_exported_run_imports_and_detects_the_same(chain: Path, toy: Path, tmp_path: Path) -> None:
    file, workspace = tmp_path / "model.pth", tmp_path / "workspace"
    said = aligndet("export", "-w", chain, "--to", "mmdet", "-o", file).stdout
    assert said.splitlines()[0] == str(file)
    ran = aligndet("import-weights", file, "-w", workspace, "--name", "again", "--json").json()
    assert ran["result"]["layout"] == "mmdet" and ran["result"]["used"] == ran["result"]["tensors"]
    assert "already complete" in aligndet("import-weights", file, "-w", workspace, "--name", "again").stdout

    original = read_detector(next(chain.glob("finetune/*/weights.pt")))
    again = read_detector(workspace / "finetune/again/weights.pt")
    assert again.state_dict.keys() == original.state_dict.keys()
    assert all(torch.equal(tensor, original.state_dict[name]) for name, tensor in again.state_dict.items())
    assert (again.detector, again.categories) == (original.detector, original.categories)
    assert again.resolution == original.resolution

    aligndet("evaluate", toy, "-w", workspace, "--run", "again", "--name", "again", "--set", "plots=false")
    (before,) = chain.glob("evaluate/*/predictions.json")
    assert (workspace / "evaluate/again/predictions.json").read_bytes() == before.read_bytes()
    aligndet("finetune", toy, "-w", workspace, "--init", workspace / "finetune/again/weights.pt", "--dry-run", "-q")
    assert "again" in aligndet("status", "-w", workspace).stdout


def test_pretrained_weights_are_found_by_finetune(chain: Path, toy: Path, tmp_path: Path) -> None:
    file, workspace = tmp_path / "pretrained.pth", tmp_path / "workspace"
    (run,) = chain.glob("pretrain-box/*")
    ran = aligndet("export", "-w", chain, "--run", f"pretrain-box/{run.name}", "-o", file, "--json").json()
    assert ran["left_out"] == [] and ran["file"] == str(file)
    report = aligndet("import-weights", file, "-w", workspace, "--json").json()
    assert report["folder"] == str(workspace / "pretrain-box/retinanet-resnet18-mmdet")
    assert "imported" in aligndet("status", "-w", workspace).stdout
    again, original = (
        read_detector(folder / "weights.pt") for folder in (workspace / "pretrain-box/retinanet-resnet18-mmdet", run)
    )
    assert all(torch.equal(tensor, original.state_dict[name]) for name, tensor in again.state_dict.items())
    assert torch.equal(again.extra["projector"]["output.weight"], original.extra["projector"]["output.weight"])
    effective = aligndet("finetune", toy, "-w", workspace, "--dry-run", "--json").json()["effective"]
    assert effective["weights"] == "pretrain-box/retinanet-resnet18-mmdet"


# ---- files ----


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "bomb", "pickle", "empty", "ours"])
def test_bad_files_are_one_line_and_exit_4(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bad.pth"
    if kind == "text":
        file.write_text("not weights")
    elif kind == "pickle":
        file = file.with_suffix(".pkl")
        file.write_bytes(pickle.dumps({"model": {"a": Bomb()}}))
    elif kind in ("bomb", "empty"):
        torch.save({"state_dict": {"a": Bomb()} if kind == "bomb" else {}}, file)
    elif kind == "ours":
        write_detector(file, detector_file("retinanet"))
    elif kind == "truncated":
        torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1000)}}, file)
        file.write_bytes(file.read_bytes()[:-500])
    line = aligndet("import-weights", file, "-w", tmp_path / "workspace", code=4).error_line()
    assert str(file) in line and ("python -c" in line) == (kind == "pickle")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "workspace").exists()


def test_usage_errors(chain: Path, tmp_path: Path) -> None:
    assert "name it: `aligndet import-weights FILE`" in aligndet("import-weights", code=2).error_line()
    line = aligndet("export", "-w", chain, "--to", "caffe", code=2).error_line()
    assert "--to caffe: write one of mmdet, torchvision, onnx" in line
    assert "not found" in aligndet("export", "-w", chain, "--run", "nobody", code=2).error_line()
    assert "is a folder" in aligndet("export", "-w", chain, "-o", tmp_path, code=2).error_line()
    line = aligndet("export", "-w", chain, "--to", "onnx", "--image-size", "60x64", code=2).error_line()
    assert "both multiples of 32" in line


# ---- classes ----


def test_coco_and_voc_tables(shared_data: Path) -> None:
    labels = json.loads((shared_data / "minicoco/annotations/instances_val2017.json").read_text())["categories"]
    assert sorted((entry["id"], entry["name"]) for entry in labels) == [(c.category_id, c.name) for c in COCO]
    assert [(c.category_id, c.name) for c in COCO_BY_ID if c.name == "stop sign"] == [(13, "stop sign")]
    assert all(index == category.category_id for index, category in enumerate(COCO_BY_ID)) and len(COCO_BY_ID) == 91
    assert len(VOC) == 20 and VOC[19] == Category(20, "tvmonitor")


def test_outputs_for_unused_ids_are_neither_evaluated_nor_missed() -> None:
    """DETR's 91 classes are COCO's 80 and 11 ids that no data has."""
    data = SimpleNamespace(categories=COCO, root=Path("coco"), annotations=None, image_ids=[7])
    check_categories("detr", COCO_BY_ID, data)
    with pytest.raises(DataError, match="id 1 is missing in the run"):
        check_categories("detr", COCO_BY_ID[2:], data)
    found = Detections(torch.rand(3, 4), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([12, 13, 0]))
    model = SimpleNamespace(detect=lambda images: [found])
    batch = ([0], ImageBatch(torch.zeros(1, 3, 32, 32), ((32, 32),)), [(32, 32)])
    ((_, entries),) = predict_each(model, [batch], data, COCO_BY_ID)
    assert [entry["category_id"] for entry in entries] == [13]


def test_a_class_is_unused_by_its_flag_and_not_by_its_name(tmp_path: Path) -> None:
    users = (Category(3, "N/A"), Category(5, ""), Category(7, "N/A", is_unused=True))
    found = Detections(torch.rand(3, 4), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 2]))
    batch = ([0], ImageBatch(torch.zeros(1, 3, 32, 32), ((32, 32),)), [(32, 32)])
    data = SimpleNamespace(categories=users[:2], image_ids=[7])
    check_categories("run", users, data)
    ((_, entries),) = predict_each(SimpleNamespace(detect=lambda images: [found]), [batch], data, users)
    assert [entry["category_id"] for entry in entries] == [3, 5]
    content = replace(detector_file("retinanet"), categories=users)
    write_detector(tmp_path / "weights.pt", content)
    assert read_detector(tmp_path / "weights.pt").categories == users
    torch.save(mmdet_checkpoint(content)[0], tmp_path / "exported.pth")
    aligndet("import-weights", tmp_path / "exported.pth", "-w", tmp_path / "workspace", "--name", "again")
    assert read_detector(tmp_path / "workspace/finetune/again/weights.pt").categories == users


def test_files_without_unused_classes_are_those_of_earlier_versions(tmp_path: Path) -> None:
    write_detector(tmp_path / "weights.pt", detector_file("retinanet"))
    plain = torch.load(tmp_path / "weights.pt", weights_only=True)["categories"]
    assert plain[0] == {"category_id": 3, "name": "cell"}
    assert mmdet_checkpoint(detector_file("retinanet"))[0]["meta"]["aligndet"]["categories"][0] == [3, "cell"]


def test_classes_of_one_name_keep_their_ids(tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "cat"}]}))
    both = (Category(4, "cat"), Category(9, "cat"))
    assert resolve_categories(str(labels), 2, {"CLASSES": ("cat", "cat")}, FILE) == both
    names = tuple(category.name for category in COCO_BY_ID)
    assert resolve_categories(None, 91, {"CLASSES": names}, FILE) == COCO_BY_ID
    assert resolve_categories(None, 2, {"CLASSES": ("N/A", "N/A")}, FILE) == (Category(1, "N/A"), Category(2, "N/A"))


def test_classes_by_name_by_number_and_by_file(tmp_path: Path) -> None:
    names = [category.name for category in COCO]
    assert resolve_categories(None, 80, {"CLASSES": tuple(reversed(names))}, FILE) == tuple(reversed(COCO))
    assert resolve_categories(None, 80, {}, FILE) == COCO and resolve_categories("coco", 91, {}, FILE) == COCO_BY_ID
    assert resolve_categories(None, 2, {"CLASSES": ["rod", "disc"]}, FILE) == (Category(1, "rod"), Category(2, "disc"))
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"categories": [{"id": 9, "name": "rod"}, {"id": 4, "name": "disc"}]}))
    disc, rod = Category(4, "disc"), Category(9, "rod")
    assert resolve_categories(str(labels), 2, {}, FILE) == (disc, rod)
    assert resolve_categories(str(labels), 2, {"CLASSES": ("rod", "disc")}, FILE) == (rod, disc)
    with pytest.raises(WeightsError, match="some.pth: 2 classes without names; .* --categories FILE.json"):
        resolve_categories(None, 2, {}, FILE)
    with pytest.raises(ConfigError, match="--categories voc: some.pth has 2 classes"):
        resolve_categories("voc", 2, {}, FILE)
    with pytest.raises(ConfigError, match="not a COCO json"):
        resolve_categories(str(Path(__file__)), 2, {}, FILE)
