import contextlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.config import DataConfig, RuntimeConfig
from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors.checkpoint import LoadedDetector, load_detector
from aligndet_cli.detectors.interface import Detections
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.errors import ConfigError, DataError
from aligndet_cli.evaluate import stage
from aligndet_cli.evaluate.stage import EvaluateConfig, Plan
from aligndet_cli.files import write_json
from aligndet_cli.metrics.coco import COCO_NUMBERS
from aligndet_cli.plotting import COLOURS
from aligndet_cli.processes.devices import Process
from aligndet_cli.stage import Conclusion
from aligndet_cli.workspace import Workspace
from helpers.small_detectors import save_detector

NUM_IMAGES = 7
CATEGORIES = (Category(4, "red"), Category(9, "green"))


class Killed(BaseException):
    """Stands for `kill -9`: nothing of ours runs after it."""


class ColourDetector(nn.Module):
    """Finds the red and the green rectangle of an image, by looking; dies at the image `dies_at`."""

    def __init__(self, dies_at: int | None = None, is_blind: bool = False) -> None:
        super().__init__()
        self.seen, self.dies_at, self.is_blind = 0, dies_at, is_blind

    def detect(self, images: ImageBatch) -> list[Detections]:
        found = []
        for pixels, (height, width) in zip(images.pixels, images.sizes_hw, strict=True):
            if self.seen == self.dies_at:
                raise Killed
            self.seen += 1
            boxes, class_ids = [], []
            for class_id in (0, 1):
                rows, columns = torch.where(pixels[class_id, :height, :width] > 0)
                if len(rows) and not self.is_blind:
                    boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                    class_ids.append(class_id)
            scores = torch.linspace(0.9, 0.8, len(boxes))
            box_tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
            found.append(Detections(box_tensor, scores, torch.tensor(class_ids, dtype=torch.int64)))
        return found


@dataclass(frozen=True)
class Loaded(LoadedDetector):
    model: Any
    categories: tuple[Category, ...] = CATEGORIES
    resolution: tuple[int, int] = (64, 96)  # the size of the images: nothing is resized
    has_masks: bool = False


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """Seven images, landscape and portrait, one without boxes; a red rectangle on all others, a green one on some."""
    root = tmp_path / "coco"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    rng = np.random.default_rng(3)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(NUM_IMAGES):
        height, width = (64, 96) if number % 2 else (96, 64)
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        images.append({"id": 100 + 3 * number, "file_name": f"{number}.png", "height": height, "width": width})
        for class_id in range(0 if number == 2 else 1 + number % 2):
            x, y = rng.integers(0, 20), 30 * class_id + rng.integers(0, 8)
            w, h = rng.integers(10, 40), rng.integers(8, 20)
            pixels[y : y + h, x : x + w, class_id] = 255
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": images[-1]["id"],
                    "category_id": CATEGORIES[class_id].category_id,
                    "bbox": [int(value) for value in (x, y, w, h)],
                    "area": int(w * h),
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(root / "val2017" / f"{number}.png")
    categories = [{"id": category.category_id, "name": category.name} for category in CATEGORIES]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with two finished fine-tuned runs, whose detector is `ColourDetector`."""
    workspace = Workspace(tmp_path / "workspace")
    for name in ("first", "second"):
        folder = workspace.root / "finetune" / name
        folder.mkdir(parents=True)
        finished = f"2026-01-01T00:00:0{1 if name == 'first' else 2}"
        made = {"inputs": {"weights": ""}, "result": {"init": "backbone" if name == "first" else "pretrain"}}
        write_json(folder / "manifest.json", {"content_hash": name, "finished": finished, **made})
        write_json(folder / "config.json", {"training": {}, "detector": {"family": "fcos"}})
    use_detector(monkeypatch, lambda: ColourDetector())
    monkeypatch.setattr(stage, "CHUNK_IMAGES", 2)
    return workspace


def use_detector(monkeypatch: pytest.MonkeyPatch, make_model: Callable[[], nn.Module], **fields: Any) -> None:
    monkeypatch.setattr(stage, "load_detector", lambda path: Loaded(make_model(), **fields))


def evaluate(workspace: Workspace, root: Path, *, force: bool = False, plots: bool = False, **settings: Any) -> Plan:
    config = EvaluateConfig(data=DataConfig(root=root), plots=plots, **settings)
    plan = stage.prepare(config, workspace, force=force)
    if plan.output.action != "complete":
        with plan.output.lock():
            stage.run(plan, Process())
    return plan


def files_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "manifest.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_perfect_detector_gets_one(workspace: Workspace, coco_root: Path) -> None:
    plan = evaluate(workspace, coco_root, plots=True)
    artifact = workspace.require("evaluate", "second-val2017")  # the newest run
    metrics = json.loads((artifact.folder / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["counts"] == {"images": 7, "ground_truths": 9, "ignored_ground_truths": 0, "predictions": 9}
    assert "voc" not in metrics
    assert artifact.result["AP"] == metrics["AP"]
    assert stage.conclude(plan) == Conclusion()
    assert sorted(files_of(artifact.folder)) == [
        "analysis.json",
        "config.json",
        "ground_truth.json",
        "metrics.json",
        "plots/best_and_worst.png",
        "plots/confusion.png",
        "plots/detections.png",
        "plots/errors.png",
        "plots/per_class_ap.png",
        "plots/precision_recall.png",
        "predictions.json",
    ]


@pytest.mark.parametrize("truth_file", ["the data's own", "ground_truth.json"])
def test_metrics_equal_pycocotools_on_predictions_json(workspace: Workspace, coco_root: Path, truth_file: str) -> None:
    # At another resolution the boxes are no longer exact, and AP is no longer 1.
    plan = evaluate(workspace, coco_root, short_side=37, long_side=50, batch_size=3)
    folder = plan.output.folder
    own = coco_root / "annotations" / "instances_val2017.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(own if truth_file == "the data's own" else folder / truth_file))
        reference = COCOeval(truth, truth.loadRes(str(folder / "predictions.json")), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0.1 < metrics["AP"] < 0.99
    expected = [None if value == -1 else value for value in reference.stats.tolist()]
    assert [metrics[name] for name in COCO_NUMBERS] == expected


def test_predictions_have_the_original_ids(workspace: Workspace, coco_root: Path) -> None:
    folder = evaluate(workspace, coco_root).output.folder
    predictions = json.loads((folder / "predictions.json").read_text())
    truth = json.loads((coco_root / "annotations" / "instances_val2017.json").read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox")
    assert [[entry[key] for key in keys] for entry in predictions] == [[entry[key] for key in keys] for entry in truth]


@pytest.mark.parametrize("dies_at", [0, 1, 2, 5, 6])
def test_killed_and_run_again_gives_the_same_files(
    workspace: Workspace, coco_root: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    whole = files_of(evaluate(workspace, coco_root, name="whole").output.folder)
    use_detector(monkeypatch, lambda: ColourDetector(dies_at))
    with pytest.raises(Killed):
        evaluate(workspace, coco_root, name="killed")
    assert workspace.find("evaluate", "killed") is None
    detectors: list[ColourDetector] = []

    def make_detector() -> ColourDetector:
        detectors.append(ColourDetector())
        return detectors[-1]

    use_detector(monkeypatch, make_detector)
    plan = evaluate(workspace, coco_root, name="killed")
    assert plan.output.action == "resume"
    assert detectors[-1].seen == NUM_IMAGES - dies_at // 2 * 2  # whole chunks of two are not done again
    resumed = files_of(plan.output.folder)
    assert resumed.pop("config.json") != whole.pop("config.json")  # the name
    assert resumed == whole


class MaskDetector(ColourDetector):
    """Its masks fill the left half of their boxes."""

    def detect(self, images: ImageBatch) -> list[Detections]:
        mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4)
        return [replace(found, masks=mask.expand(len(found.boxes), -1, -1)) for found in super().detect(images)]


@pytest.mark.parametrize(("is_half", "expected"), [(True, 1.0), (False, 0.1)])
def test_masks_are_measured_too(
    workspace: Workspace, coco_root: Path, monkeypatch: pytest.MonkeyPatch, is_half: bool, expected: float
) -> None:
    # Half of a rectangle overlaps the whole of it by about 0.5, which counts at the lowest of ten thresholds at best.
    file = coco_root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        right = x + w / 2 if is_half else x + w
        entry["segmentation"] = [[x, y, right, y, right, y + h, x, y + h]]
    file.write_text(json.dumps(content))
    use_detector(monkeypatch, MaskDetector, has_masks=True)
    plan = evaluate(workspace, coco_root)
    metrics = json.loads((plan.output.folder / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["segm"]["AP50" if is_half else "AP"] <= expected and metrics["segm"]["counts"]["ground_truths"] > 5
    if is_half:
        assert metrics["segm"]["AP50"] == pytest.approx(1.0)
    assert workspace.require("evaluate").result["mask_AP50"] == metrics["segm"]["AP50"]


def test_masks_without_predictions_are_zero(
    workspace: Workspace, coco_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = coco_root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    file.write_text(json.dumps(content))
    use_detector(monkeypatch, lambda: MaskDetector(is_blind=True), has_masks=True)
    plan = evaluate(workspace, coco_root)
    assert json.loads((plan.output.folder / "metrics.json").read_text())["segm"]["AP"] == 0


def test_killed_while_measuring(workspace: Workspace, coco_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files_of(evaluate(workspace, coco_root).output.folder)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage, "analyse", die)
        evaluate(workspace, coco_root, force=True)
    assert files_of(evaluate(workspace, coco_root, force=True).output.folder) == whole


def test_two_processes_give_the_same_files(
    workspace: Workspace, coco_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = files_of(evaluate(workspace, coco_root).output.folder)
    plan = stage.prepare(EvaluateConfig(data=DataConfig(root=coco_root), plots=False), workspace, force=True)
    main, other = Process(0, 2), Process(1, 2)

    def run_the_other(process: Process) -> None:
        """At the main process's barriers, let the other process do its part."""
        if process.is_main:
            stage.run(plan, other)

    monkeypatch.setattr(stage, "wait_for_all", run_the_other)
    with plan.output.lock():
        stage.run(plan, main)
    assert files_of(plan.output.folder) == alone


def test_run_again_is_complete_and_gates_still_hold(workspace: Workspace, coco_root: Path) -> None:
    evaluate(workspace, coco_root, short_side=37, long_side=50)
    plan = evaluate(workspace, coco_root, short_side=37, long_side=50, fail_under=0.999, run="second")
    assert plan.output.action == "complete"
    gate = stage.conclude(plan).error
    assert re.match(r"second-val2017: AP is 0\.\d+, below --fail-under 0.999", str(gate))
    plan = evaluate(workspace, coco_root, short_side=37, long_side=50, fail_under=0.01)
    assert stage.conclude(plan).error is None


def test_compare_gives_the_delta(workspace: Workspace, coco_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(workspace, coco_root, run="first", short_side=37, long_side=50)
    plan = evaluate(workspace, coco_root, run="second", compare="first")
    plan = replace(plan, config=plan.config.model_copy(update={"plots": True}))
    comparison = stage.conclude(plan).result["compare"]
    assert comparison["with"] == "first-val2017"
    assert comparison["AP"]["this"] == pytest.approx(1.0)
    assert comparison["AP"]["delta"] == pytest.approx(1.0 - comparison["AP"]["other"])
    assert comparison["AP"]["delta"] > 0.01
    plots = plan.output.folder / "plots"
    assert [file.name for file in plots.glob("compare*")] == ["compare-first-val2017.png"]  # these runs have no log
    for name in ("first", "second"):
        log = "".join(json.dumps({"step": step, "loss_cls": 1 / step}) + "\n" for step in (1, 2))
        (workspace.root / "finetune" / name / "metrics.jsonl").write_text(log)
    drawn = {}
    monkeypatch.setattr(
        stage, "plot_comparison", lambda logs, *_, colours: drawn.update(zip(logs, colours, strict=True))
    )
    stage.conclude(plan)
    assert drawn == {"AlignDet": COLOURS[1], "backbone only": COLOURS[0]}  # as in every other picture
    monkeypatch.undo()
    stage.conclude(plan)
    assert (plots / "compare-first-val2017-training.png").exists()


def test_compare_with_a_run_not_evaluated_names_the_command(workspace: Workspace, coco_root: Path) -> None:
    with pytest.raises(ConfigError, match="run `aligndet evaluate --run first --split val2017` first"):
        evaluate(workspace, coco_root, compare="first")
    with pytest.raises(ConfigError, match="no run of that name; finetune runs here: first, second"):
        evaluate(workspace, coco_root, compare="third")


def test_compare_on_other_data_is_refused(workspace: Workspace, coco_root: Path) -> None:
    evaluate(workspace, coco_root, run="first", name="short")
    config = EvaluateConfig(data=DataConfig(root=coco_root, limit=3), compare="short")
    with pytest.raises(ConfigError, match="was evaluated on other images or labels"):
        stage.prepare(config, workspace)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ((Category(4, "red"), Category(9, "blue")), "id 9 is 'blue' in the run and 'green' in the data"),
        ((Category(4, "red"), Category(9, "two\nlines")), r"id 9 is 'two\\nlines' in the run and 'green' in the data"),
        ((Category(4, "red"),), "id 9 is missing in the run and 'green' in the data"),
        ((*CATEGORIES, Category(10, "x")), "id 10 is 'x' in the run and missing in the data"),
    ],
)
def test_other_classes_are_refused(
    workspace: Workspace,
    coco_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    categories: tuple[Category, ...],
    message: str,
) -> None:
    use_detector(monkeypatch, ColourDetector, categories=categories)
    with pytest.raises(DataError, match=message):
        evaluate(workspace, coco_root)


def test_no_run_yet(tmp_path: Path, coco_root: Path) -> None:
    with pytest.raises(ConfigError, match="run `aligndet finetune` first"):
        evaluate(Workspace(tmp_path / "empty"), coco_root)


def test_nothing_detected_is_zero_and_a_warning(
    workspace: Workspace, coco_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_detector(monkeypatch, lambda: ColourDetector(is_blind=True))
    monkeypatch.setattr(stage.logger, "propagate", True)
    folder = evaluate(workspace, coco_root).output.folder
    assert json.loads((folder / "predictions.json").read_text()) == []
    assert json.loads((folder / "metrics.json").read_text())["AP"] == 0.0
    assert "AP is exactly 0" in caplog.text and "trained long enough? predictions.json and plots/ show" in caplog.text


def test_drawing_never_fails_a_run(
    workspace: Workspace, coco_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such font")

    monkeypatch.setattr("aligndet_cli.evaluate.plots.draw_per_class", fail)
    monkeypatch.setattr(stage.logger, "propagate", True)
    folder = evaluate(workspace, coco_root, plots=True).output.folder
    assert (folder / "metrics.json").exists()
    assert "plots/per_class_ap.png was not drawn: RuntimeError: no such font" in caplog.text


def test_limit_evaluates_the_first_images(workspace: Workspace, coco_root: Path) -> None:
    config = EvaluateConfig(data=DataConfig(root=coco_root, limit=2), plots=False)
    plan = stage.prepare(config, workspace)
    with plan.output.lock():
        stage.run(plan, Process())
    metrics = json.loads((plan.output.folder / "metrics.json").read_text())
    assert metrics["counts"]["images"] == 2
    assert metrics["AP"] == pytest.approx(1.0)


def test_voc_rules_on_request(workspace: Workspace, coco_root: Path) -> None:
    plan = evaluate(workspace, coco_root, metric="voc", fail_under=1.0)
    metrics = json.loads((plan.output.folder / "metrics.json").read_text())
    assert (metrics["voc"]["AP07"], metrics["voc"]["AP12"]) == (1.0, 1.0)
    assert workspace.require("evaluate").result["metric"] == "VOC AP12"
    assert stage.conclude(plan).error is None  # it is on the VOC number


def test_describe_says_where_values_come_from(workspace: Workspace, coco_root: Path) -> None:
    plan = stage.prepare(EvaluateConfig(data=DataConfig(root=coco_root)), workspace)
    described = stage.describe(plan)
    assert described["run"] == "second (newest finetune run)"
    assert described["resolution"] == "64 to 96 (from second)"
    json.dumps(described)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_named_and_can_be_repaired(
    workspace: Workspace, coco_root: Path, num_workers: int
) -> None:
    broken = coco_root / "val2017" / "4.png"
    content = broken.read_bytes()
    broken.write_bytes(b"x" * len(content))
    with pytest.raises(DataError, match=r"4\.png") as caught:
        evaluate(workspace, coco_root, runtime=RuntimeConfig(num_workers=num_workers))
    assert "\n" not in str(caught.value)
    assert workspace.find("evaluate") is None
    broken.write_bytes(content)
    plan = evaluate(workspace, coco_root, runtime=RuntimeConfig(num_workers=num_workers))
    assert plan.output.action == "resume"
    assert workspace.require("evaluate").result["AP"] == pytest.approx(1.0)


def test_a_real_detector_from_its_file(workspace: Workspace, coco_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "load_detector", load_detector)
    config = RetinaNetConfig(neck_channels=32, head_convs=1, score_threshold=0.0, max_detections=7)
    backbone_config = BackboneConfig(name="resnet18", weights="none")
    torch.manual_seed(0)
    model = config.build(build_backbone(backbone_config), len(CATEGORIES))
    save_detector(
        workspace.root / "finetune" / "second" / "weights.pt",
        model,
        stage="finetune",
        configs=(config, backbone_config),
        categories=CATEGORIES,
        resolution=(50, 70),
    )
    folder = evaluate(workspace, coco_root, batch_size=3).output.folder
    predictions = json.loads((folder / "predictions.json").read_text())
    assert len(predictions) == 7 * NUM_IMAGES
    assert {entry["category_id"] for entry in predictions} <= {4, 9}
    x, y, w, h = np.array([entry["bbox"] for entry in predictions if entry["image_id"] == 103]).T  # 96 wide, 64 high
    assert min(x.min(), y.min()) >= 0
    assert 70 < (x + w).max() <= 96.001
    assert 50 < (y + h).max() <= 64.001
