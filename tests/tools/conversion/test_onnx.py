"""Exported graphs find what our detectors find."""

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.config import DataConfig
from aligndet_cli.data.batch import ImageBatch
from aligndet_cli.data.toy import draw_toy_image
from aligndet_cli.data.transforms import resize
from aligndet_cli.detectors.checkpoint import LoadedDetector
from aligndet_cli.errors import ConfigError, RunError
from aligndet_cli.files import write_json
from aligndet_cli.tools.conversion import onnx_file
from aligndet_cli.tools.conversion.onnx_check import compare
from aligndet_cli.tools.conversion.onnx_file import OnnxOptions, comparison_batches, comparison_images, export_onnx
from aligndet_cli.tools.conversion.onnx_graph import Graph
from helpers.commandline import aligndet
from helpers.small_detectors import CATEGORIES, NARROW, save_detector
from helpers.trained_like import let_find_much

DOCS = Path(__file__).parents[3] / "docs" / "backbones.md"
RESOLUTION = (96, 160)
SIZES_HW = ((100, 150), (130, 90), (64, 110))
PICTURES = [draw_toy_image(np.random.default_rng(seed), (120, 120), max_objects=5)[0] for seed in range(3)]
IMAGES = [
    resize(torch.from_numpy(pixels).permute(2, 0, 1), size_hw)
    for pixels, size_hw in zip(PICTURES, SIZES_HW, strict=True)
]
BATCHES = comparison_batches(IMAGES, RESOLUTION, None)
DETECTORS = {
    **NARROW,
    "faster-rcnn-soft": NARROW["faster-rcnn"].model_copy(update={"nms_type": "soft_nms"}),
    "htc-semantic": NARROW["htc"].model_copy(update={"semantic_classes": 5, "nms_type": "nms"}),
}
FAMILIES = sorted(DETECTORS)


@functools.cache
def detector(family: str, backbone: str = "resnet18") -> LoadedDetector:
    torch.manual_seed(2)
    config = DETECTORS[family]
    body = build_backbone(BackboneConfig.model_validate({"name": backbone}))
    model = config.build(body, len(CATEGORIES)).eval()
    has_masks = config.RECIPE.needs_masks
    return LoadedDetector(let_find_much(model, BATCHES[0]), CATEGORIES, RESOLUTION, has_masks=has_masks)


@dataclass
class InPyTorch:
    """A graph in place of a session; `change` is applied to its outputs."""

    graph: Graph
    change: Any = staticmethod(lambda outputs: outputs)

    @torch.no_grad()
    def run(self, names: None, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        outputs = self.graph(torch.from_numpy(inputs["pixels"]), torch.from_numpy(inputs["sizes"]))
        return [output.numpy() for output in self.change([output.clone() for output in outputs])]


def test_batches_have_three_sizes_and_padding() -> None:
    assert [batch.sizes_hw for batch in BATCHES] == [((96, 144), (111, 77)), ((56, 96),)]
    assert [tuple(batch.pixels.shape) for batch in BATCHES] == [(2, 3, 128, 160), (1, 3, 64, 96)]
    fixed = comparison_batches(IMAGES, RESOLUTION, (64, 96))
    assert [batch.sizes_hw for batch in fixed] == [((64, 96),), ((51, 35),), ((33, 57),)]
    assert {tuple(batch.pixels.shape) for batch in fixed} == {(1, 3, 64, 96)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_nms", [True, False])
def test_graph_finds_what_we_find(family: str, with_nms: bool) -> None:
    if not with_nms and (family == "detr" or DETECTORS[family].RECIPE.needs_masks):
        pytest.skip("always finished in the file")
    model = detector(family).model
    found = compare(model, InPyTorch(Graph(model, 3, with_nms=with_nms)), BATCHES, with_nms=with_nms)
    assert found.mistakes == () and found.num_at_limit == 0
    assert found.num_images == 3 and found.num_detections > 60
    assert found.boxes_px < 1e-4 and found.scores < 1e-6
    assert (found.masks is None) == (not DETECTORS[family].RECIPE.needs_masks)
    if not with_nms:  # and the file has more than that
        boxes = InPyTorch(Graph(model, 3, with_nms=False)).run(None, inputs_of(BATCHES[1]))[0]
        assert boxes.shape[1] > 100


def inputs_of(batch: ImageBatch) -> dict[str, NDArray[Any]]:
    return {"pixels": batch.pixels.numpy(), "sizes": np.array(batch.sizes_hw)}


def without_suppression(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Put the best box in twice, as if it had not been suppressed."""
    return [torch.cat([output[:, :1], output], dim=1) for output in outputs]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: [found[0] + 0.2, *found[1:]], r"^image 1: ours of score 0.\d{5} has no counterpart$"),
        (lambda found: [found[0], found[1] + 0.001, *found[2:]], "has no counterpart"),
        (lambda found: [*found[:2], (found[2] + 1) % 3, found[3]], "has no counterpart"),
        (lambda found: [output[:, 1:] for output in found], "image 1: ours of score .* has no counterpart"),
        (without_suppression, "image 1: the file's of score .* has no counterpart"),
        (lambda found: [output.flip(1) for output in found], "image 1: detections are in another order"),
        (lambda found: [*found[:3], found[3] + 0.02], "image 1: masks differ by 0.02"),
    ],
    ids=["boxes", "scores", "classes", "missing", "not suppressed", "order", "masks"],
)
def test_what_differs_is_seen(change: Any, said: str) -> None:
    model = detector("mask-rcnn").model
    found = compare(model, InPyTorch(Graph(model, 3, with_nms=True), change), BATCHES, with_nms=True)
    assert any(re.search(said, mistake) for mistake in found.mistakes), found.mistakes


def test_last_detections_of_equal_score_may_be_others() -> None:
    model = detector("detr").model

    def change(found: list[torch.Tensor]) -> list[torch.Tensor]:
        boxes, scores, class_ids = found
        boxes[:, -1] += 50
        return [boxes, scores, class_ids]

    assert all(len(found.scores) == 100 for batch in BATCHES for found in model.detect(batch))
    found = compare(model, InPyTorch(Graph(model, 3, with_nms=True), change), BATCHES, with_nms=True)
    assert found.mistakes == () and found.num_at_limit == 6  # ours and theirs of three images
    assert str(found).endswith("in the same order, 6 at the limit in one of them only")


@pytest.mark.parametrize(("moved_px", "num_mistakes"), [(15, 0), (70, 4)])
def test_nms_may_choose_the_other_of_two_with_equal_scores(moved_px: int, num_mistakes: int) -> None:
    """A box in the place of one that overlaps it may be the other of two; one beside it is a mistake."""
    model = detector("retinanet").model

    def change(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs[0][0, 0, [0, 2]] += moved_px
        return outputs

    with torch.no_grad():
        first = model.detect(BATCHES[0])[0].boxes[0]
    assert 60 < first[2] - first[0] < 120
    found = compare(model, InPyTorch(Graph(model, 3, with_nms=True), change), BATCHES, with_nms=True)
    assert len(found.mistakes) == num_mistakes and found.num_at_limit == 4 - num_mistakes


def test_images_are_from_the_data_or_drawn(toy: Path, tmp_path: Path) -> None:
    images, origin = comparison_images(DataConfig(root=toy))
    assert len(images) == 3 and origin == f"3 images of {toy}"
    assert len({image.shape for image in images}) > 1
    for data, reason in ((None, "does not say"), (DataConfig(root=tmp_path / "gone"), "no such")):
        images, origin = comparison_images(data)
        assert re.match(rf"3 drawn pictures \(.*{reason}", origin)
        assert len({image.shape for image in images}) == 3


# ---- with onnxruntime ----


def in_part(names: Iterable[str], always: set[str]) -> list[Any]:
    """Return all as parameters, and mark those that only run when asked for: an export takes up to a minute."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.matrix) for name in names]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", in_part(FAMILIES, {"detr", "fcos", "htc", "mask-rcnn", "retinanet"}))
def test_onnxruntime_finds_what_we_find(family: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    loaded, file = detector(family), tmp_path / "model.onnx"
    usage, found = export_onnx(loaded, file, OnnxOptions(), IMAGES)
    assert found.num_detections > 60 and found.num_at_limit <= 2  # scores may be equal
    outputs = "boxes, scores, class_ids" + (", masks" if DETECTORS[family].RECIPE.needs_masks else "")
    assert usage == f"onnxruntime: pixels (B, 3, H, W) and sizes (B, 2) to {outputs}"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(file)
    assert [axes.shape for axes in session.get_inputs()] == [["batch", 3, "height", "width"], ["batch", 2]]
    # An image in which there is nothing to see, or next to nothing.
    with torch.no_grad():
        for side in (32, 64):
            batch = ImageBatch(torch.zeros(1, 3, side, side), ((side, side),))
            assert compare(loaded.model, session, [batch], with_nms=True).mistakes == ()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "backbone",
    in_part(
        ["mobilenet_v2", "convnext_tiny", "efficientnet_b0", "efficientnet_lite0", "timm:regnety_002"],
        {"mobilenet_v2", "convnext_tiny", "timm:regnety_002"},
    ),
)
def test_backbones_of_other_families_take_images_of_any_size(backbone: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    usage, found = export_onnx(detector("retinanet", backbone), tmp_path / "model.onnx", OnnxOptions(), IMAGES)
    assert usage.startswith("onnxruntime: pixels (B, 3, H, W)") and found.mistakes == ()
    assert found.num_images == 3 and found.num_detections > 60


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "backbone",
    in_part(
        ["convnext_tiny", *(f"timm:{name}" for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224"))],
        {"timm:vit_tiny_patch16_224"},
    ),
)
def test_every_box_and_score_of_strong_backbones_is_ours(backbone: str, tmp_path: Path) -> None:
    """The second ViT has rotary positions, too, and patches of 14 pixels, for which the image is made smaller."""
    runtime, file = pytest.importorskip("onnxruntime"), tmp_path / "model.onnx"
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    loaded = detector("retinanet", backbone)
    export_onnx(loaded, file, OnnxOptions(with_nms=False, size_hw=(64, 96)), IMAGES)
    inputs = inputs_of(comparison_batches(IMAGES, RESOLUTION, (64, 96))[0])
    expected = InPyTorch(Graph(loaded.model, 3, with_nms=False)).run(None, inputs)
    found = runtime.InferenceSession(file).run(None, inputs)
    # Rows of a box in shares of the image, its score, and its class, which must not differ.
    (rows, others) = (
        torch.from_numpy(np.concatenate([boxes / 96, scores[..., None], class_ids[..., None]], axis=2)[0])
        for boxes, scores, class_ids in (found, expected)
    )
    assert rows.shape == others.shape and len(rows) > 100
    # They are sorted by level and score, and the scores of two can be equal: rows may be in each other's place.
    distances = torch.cdist(rows.double(), others.double(), p=float("inf"))
    assert distances.min(dim=1).values.max() < 1e-4 and distances.min(dim=0).values.max() < 1e-4


@pytest.fixture
def workspace(tmp_path: Path, toy: Path) -> Path:
    """A workspace with a fine-tuned run of the toy set."""
    run = tmp_path / "workspace" / "finetune" / "much"
    run.mkdir(parents=True)
    write_json(run / "manifest.json", {"content_hash": "x", "finished": "2026-01-01", "result": {}})
    write_json(run / "config.json", {"data": DataConfig(root=toy).model_dump(mode="json")})
    config, backbone = NARROW["retinanet"], BackboneConfig(name="resnet18", weights="none")
    where = {"stage": "finetune", "configs": (config, backbone), "categories": CATEGORIES, "resolution": RESOLUTION}
    save_detector(run / "weights.pt", detector("retinanet").model, **where)
    return tmp_path / "workspace"


@pytest.mark.slow
def test_export_and_the_program_of_the_docs(
    workspace: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    ran = aligndet("export", "--to", "onnx", "-o", tmp_path / "model.onnx", "-w", workspace, "--json").json()
    found = ran["comparison"]
    assert found["in"] == f"3 images of {toy}" and found["num_images"] == 3 and found["num_detections"] > 60
    assert found["boxes_px"] < 0.1 and found["scores"] < 1e-4 and found["mistakes"] == []
    # `aligndet predict` finds the same as the program.
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"\n\n((?:    import json\n)(?:    .*\n|\n)*)", DOCS.read_text(encoding="utf-8"))
    # Losslessly and at the detector's size: OpenCV decodes and resizes otherwise than we do, by a grey level at most.
    Image.fromarray(resize(IMAGES[0], (96, 144)).permute(1, 2, 0).numpy()).save("photo.jpg", format="PNG")
    capsys.readouterr()
    exec(re.sub("^    ", "", program, flags=re.MULTILINE).replace("score >= 0.5", "score >= 0.2"), {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    words = ("predict", "photo.jpg", "-w", workspace, "--score", "0.2", "-o", "out", "--no-annotated")
    aligndet(*words)
    content = json.loads(Path("out/predictions.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert len(printed) == len(content["annotations"]) > 10
    for (name, score, *box), entry in zip(printed, content["annotations"], strict=True):
        x, y, width, height = entry["bbox"]
        assert name == names[entry["category_id"]] and float(score) == pytest.approx(entry["score"], abs=0.001)
        assert [float(side) for side in box] == pytest.approx([x, y, x + width, y + height], abs=0.06)


@pytest.mark.slow
def test_one_size_without_nms_and_a_file_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")
    loaded, file = detector("faster-rcnn"), tmp_path / "model.onnx"
    usage, found = export_onnx(loaded, file, OnnxOptions(with_nms=False, size_hw=(64, 96)), IMAGES)
    assert "pixels (1, 3, 64, 96)" in usage and "suppress boxes by class" in usage
    assert found.num_detections > 60
    assert runtime.InferenceSession(file).get_inputs()[0].shape == [1, 3, 64, 96]
    file.unlink()
    monkeypatch.setattr(onnx_file, "compare", lambda *_, **__: replace(found, mistakes=("image 1: something",)))
    monkeypatch.setattr(onnx_file, "_write", lambda _, place, __: place.write_bytes(b"") and ())
    monkeypatch.setattr(runtime, "InferenceSession", lambda *_, **__: None)
    with pytest.raises(RunError, match="not written, onnxruntime finds something else .*: 1 differences, the first"):
        export_onnx(loaded, file, OnnxOptions(), IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_said_at_once(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "PACKAGES", ())
    for family, said in (("detr", "has no NMS"), ("mask-rcnn", "masks are made of the boxes that NMS leaves")):
        with pytest.raises(ConfigError, match=said):
            OnnxOptions(with_nms=False).check(family, "resnet18")
    with pytest.raises(ConfigError, match="windows of swin_t .* --image-size HEIGHTxWIDTH"):
        OnnxOptions().check("fcos", "swin_t")
    OnnxOptions(size_hw=(320, 512)).check("fcos", "swin_t")
    export = ("export", "-w", workspace, "-o", tmp_path / "x")
    for flag in (("--no-with-nms",), ("--with-nms",), ("--image-size", "64x96")):
        assert "only --to onnx has a choice there" in aligndet(*export, "--to", "mmdet", *flag, code=2).error_line()
    assert "write HEIGHTxWIDTH" in aligndet(*export, "--to", "onnx", "--image-size", "64", code=2).error_line()
    monkeypatch.setattr(onnx_file, "PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"no_such_package not installed; run pip install 'aligndet\[onnx\]'"):
        OnnxOptions().check("fcos", "resnet18")
    assert not (tmp_path / "x").exists()
