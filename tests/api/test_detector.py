"""The detector of the Python API: images of any kind in, torchvision's dictionaries out."""

import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.tv_tensors import BoundingBoxes

import aligndet_cli as aligndet
from aligndet_cli.data.dataset import Category
from aligndet_cli.data.images import read_image
from aligndet_cli.detectors.checkpoint import write_detector
from helpers.commandline import aligndet as command
from helpers.small_detectors import CATEGORIES, CONFIGS, detector_file


@pytest.fixture(scope="module")
def detector(chain: Path) -> aligndet.ImageDetector:
    return aligndet.load(chain / "finetune" / "retinanet-resnet18")


@pytest.fixture(scope="module")
def photos(toy: Path) -> list[Path]:
    return sorted((toy / "val").iterdir())


def of_family(family: str, folder: Path, categories: tuple[Category, ...] = CATEGORIES) -> aligndet.ImageDetector:
    """A small detector that finds much."""
    content = detector_file(family)
    changes = {"score_threshold": 0.0} if "score_threshold" in type(content.detector).model_fields else {}
    content = replace(content, detector=content.detector.model_copy(update=changes), categories=categories)
    write_detector(folder / "weights.pt", content)
    return aligndet.load(folder / "weights.pt")


def test_the_numbers_are_those_of_evaluate(detector: aligndet.ImageDetector, chain: Path, toy: Path) -> None:
    evaluation = next((chain / "evaluate").iterdir())
    entries = json.loads((evaluation / "predictions.json").read_text())
    files = {
        image["id"]: image["file_name"]
        for image in json.loads((evaluation / "ground_truth.json").read_text())["images"]
    }
    assert len(files) == 11 and entries
    found = detector.predict((toy / "val" / name for name in files.values()), score=0)
    for number, one in zip(files, found, strict=True):
        expected = [entry for entry in entries if entry["image_id"] == number]
        boxes = torch.tensor([entry["bbox"] for entry in expected]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(one["boxes"], boxes, atol=2e-3, rtol=0)  # predictions.json is rounded to 3 digits
        assert one["scores"].tolist() == pytest.approx([entry["score"] for entry in expected], abs=1e-6)
        assert one["labels"].tolist() == [entry["category_id"] for entry in expected]
    assert detector.names == {2: "disc", 3: "square", 5: "triangle", 7: "star", 11: "cross"}


def test_masks_are_those_of_predict(tmp_path: Path, photos: list[Path]) -> None:
    detector = of_family("mask-rcnn", tmp_path)
    words = ["--weights", tmp_path / "weights.pt", "--output", tmp_path / "found", "--score", "0"]
    command("predict", photos[0], *words)
    entries = json.loads((tmp_path / "found" / "predictions.json").read_text())["annotations"]
    height, width = read_image(photos[0]).shape[:2]
    (found,) = detector.predict(photos[0], score=0)
    assert found["masks"].shape == (len(entries), 1, height, width) and len(entries) > 10
    for mask, entry in zip(found["masks"][:, 0] >= 0.5, entries, strict=True):
        expected = coco_mask.decode(entry["segmentation"]).astype(bool)
        assert (mask.numpy() != expected).mean() < 1e-3  # the box of a mask is rounded in the file
    assert found["masks"].min() >= 0 and found["masks"].max() <= 1


def test_every_kind_of_image_gives_the_same(detector: aligndet.ImageDetector, photos: list[Path]) -> None:
    pixels = read_image(photos[0])
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [photos[0], str(photos[0]), pixels, Image.open(photos[0]), tensor, tensor.float() / 255]
    (expected,) = detector.predict(photos[0], score=0.0)
    assert len(expected["boxes"])

    def one_after_the_other() -> Iterator[object]:
        yield from kinds

    for images in (kinds, tuple(kinds), one_after_the_other()):
        found = detector.predict(images, score=0.0)  # type: ignore[arg-type]  # of several kinds
        assert len(found) == len(kinds)
        for one in found:
            for name, value in one.items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    for batch in (np.stack([pixels, pixels]), torch.stack([tensor, tensor]), [kind for kind in kinds[:2]]):
        assert len(detector.predict(batch, score=0.0)) == 2


def test_a_pillow_image_is_turned_upright(detector: aligndet.ImageDetector, photos: list[Path], tmp_path: Path) -> None:
    image = Image.open(photos[0])
    exif = image.getexif()
    exif[0x0112] = 6  # lies on its side
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    lying = Image.open(tmp_path / "lying.png")
    assert lying.size == image.size[::-1]
    expected, found = detector.predict([photos[0], lying], score=0.0)
    torch.testing.assert_close(found["boxes"], expected["boxes"])
    assert Path(str(lying.filename)).exists()


def test_scores_and_batches(detector: aligndet.ImageDetector, photos: list[Path]) -> None:
    one_by_one = detector.predict(photos, score=0.0)
    together = detector.predict(photos, score=0.0, batch_size=4)
    assert [len(found["boxes"]) for found in one_by_one] == [len(found["boxes"]) for found in together]
    limit = float(one_by_one[0]["scores"][5])
    (kept,) = detector.predict(photos[0], score=limit)
    assert len(kept["scores"]) == int((one_by_one[0]["scores"] >= limit).sum())
    assert detector.predict([]) == []
    modes = {name: module.training for name, module in detector.named_modules()}
    detector.model.neck.eval()
    detector.predict(photos[0])
    assert {name for name, module in detector.named_modules() if module.training != modes[name]} == {
        name for name in modes if name.startswith("model.neck")
    }
    detector.model.neck.train()
    wrong: tuple[dict[str, object], ...] = (
        {"score": 2},
        {"score": None},
        {"score": "0.5"},
        {"batch_size": 0},
        {"batch_size": 2.5},
    )
    for setting in wrong:
        with pytest.raises(
            aligndet.ConfigError, match="|".join(f"{name}={value!r}" for name, value in setting.items())
        ):
            detector.predict(photos[0], **setting)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixel = np.zeros((1, 1, 3), np.uint8)
        pixel.flags.writeable = False  # as arrays of Pillow's images are
        detector.predict(pixel)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_convention_is_torchvisions(family: str, tmp_path: Path) -> None:
    detector = of_family(family, tmp_path)
    assert detector.names == {3: "cell", 5: "disc", 7: "rod"}
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 70, 90, generator=generator), torch.rand(3, 96, 64, generator=generator)]
    targets = [
        {"boxes": torch.tensor([[5.0, 6, 40, 50]]), "labels": torch.tensor([7]), "masks": torch.ones(1, 70, 90)},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 96, 64)},
    ]
    losses = detector(images, targets)
    assert isinstance(losses, dict) and all(
        name.startswith("loss_") and not loss.dim() for name, loss in losses.items()
    )
    torch.stack(list(losses.values())).sum().backward()
    assert any(parameter.grad is not None for parameter in detector.parameters())
    # DataLoaders with torchvision's collate function give tuples
    found = detector.eval()(tuple(images))
    assert isinstance(found, list) and len(found) == 2
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96).eval()
    (expected,) = theirs(images[:1])
    assert expected.keys() == found[0].keys() - {"masks"}
    for one, image in zip(found, images, strict=True):
        boxes, labels, scores = one["boxes"], one["labels"], one["scores"]
        assert len(boxes) and boxes.shape == (len(scores), 4) and labels.dtype == torch.int64
        assert set(labels.tolist()) <= set(detector.names)
        assert (boxes >= 0).all() and boxes[:, 2].max() <= image.shape[2] and boxes[:, 3].max() <= image.shape[1]
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        assert ("masks" in one) == CONFIGS[family].RECIPE.needs_masks


@pytest.mark.parametrize(
    ("ids", "labels"),
    [((1, 2, 3), [1, 2, 3]), ((0, 1, 2), [1, 2, 3]), ((3, 5, 90), [3, 5, 90]), ((0, 7, 9), [1, 8, 10])],
)
def test_labels_are_category_ids_and_never_0(ids: tuple[int, ...], labels: list[int], tmp_path: Path) -> None:
    categories = tuple(Category(number, name) for number, name in zip(ids, "abc", strict=True))
    detector = of_family("retinanet", tmp_path, categories)
    assert detector.names == dict(zip(labels, "abc", strict=True))
    assert aligndet.load(tmp_path / "weights.pt", num_classes=4).names == detector.names


def test_an_output_that_stands_for_no_class_is_never_found(tmp_path: Path) -> None:
    categories = (Category(0, "-", is_unused=True), Category(1, "cell"), Category(4, "rod"))
    detector = of_family("detr", tmp_path, categories).eval()
    assert detector.names == {1: "cell", 4: "rod"}
    (found,) = detector.predict(torch.zeros(3, 64, 96), score=0)
    assert set(found["labels"].tolist()) <= {1, 4}


XYWH = BoundingBoxes(torch.tensor([[5.0, 6, 40, 50]]), format="XYWH", canvas_size=(64, 64))  # type: ignore[call-overload]


def target(**changes: object) -> list[dict[str, object]]:
    return [{"boxes": torch.tensor([[5.0, 6, 40, 50]]), "labels": torch.tensor([7]), **changes}]


@pytest.mark.parametrize(
    ("images", "targets", "words"),
    [
        ([torch.rand(3, 64, 64)], None, "call its eval"),
        ([torch.rand(3, 64, 64)], [], "1 images, but 0 targets"),
        ([torch.rand(64, 64, 3)], target(), r"images\[0\]: is a tensor \(64, 64, 3\)"),
        ([torch.rand(3, 64, 64) * 255], target(), "0..1, and the detector normalises"),
        ([torch.full((3, 64, 64), torch.nan)], target(), "values from nan"),
        ([torch.ones(3, 64, 64, dtype=torch.int64)], target(), "torch.int64"),
        ([torch.rand(3, 64, 64)], target(labels=torch.tensor([0])), r"label 0 is none of .* \[3, 5, 7\]; 0 is back"),
        ([torch.rand(3, 64, 64)], target(labels=torch.tensor([7, 7])), r"boxes \(1, 4\) with labels \(2,\)"),
        ([torch.rand(3, 64, 64)], target(boxes=torch.tensor([[5.0, 6, 5, 50]])), "box 0 is .*x2 > x1"),
        ([torch.rand(3, 64, 64)], [{"labels": torch.tensor([1])}], r"targets\[0\]: has no boxes"),
        ([torch.rand(3, 64, 64)], [None], r"targets\[0\]: is of type NoneType"),
        ([torch.rand(3, 64, 64)], {"boxes": torch.zeros(0, 4)}, r"targets\[0\]: is of type str"),
        ([torch.rand(3, 64, 64)], target(boxes=[[5, 6, 40, 50]]), "boxes of type list"),
        ([torch.rand(3, 64, 64)], target(labels=torch.tensor([7j])), "labels of torch.complex64"),
        (
            [torch.rand(3, 64, 64)],
            target(boxes=torch.tensor([[-9.0, 6, 0, 50]])),
            "box 0 .* outside of its image, 64 w",
        ),
        ([torch.rand(3, 60, 64)], target(boxes=torch.tensor([[5.0, 60, 9, 70]])), "box 0 .*, 64 wide and 60 high"),
        ([torch.rand(3, 64, 64)], target(boxes=XYWH), "boxes are XYWH; convert"),
        ([torch.rand(3, 64, 64)], target(masks=torch.ones(1, 8, 8)), r"give \(1, 64, 64\)"),
    ],
)
def test_what_is_wrong_is_said(images: object, targets: object, words: str, tmp_path: Path) -> None:
    detector = of_family("mask-rcnn", tmp_path)
    with pytest.raises(aligndet.AlignDetError, match=words):
        detector(images, targets)


def test_a_semantic_branch_learns_from_classes_of_pixels(tmp_path: Path) -> None:
    of_family("htc", tmp_path)
    detector = aligndet.load(tmp_path / "weights.pt", config={"detector": {"semantic_classes": 4}}).train()
    images, masks = [torch.rand(3, 64, 80)], torch.ones(1, 64, 80)
    classes = torch.arange(80).expand(64, 80) % 4
    with_none = torch.where(torch.arange(64)[:, None] < 9, 255, classes)
    losses = detector(images, target(masks=masks, pixel_classes=with_none))
    assert isinstance(losses, dict) and losses["loss_semantic"] > 0
    for wrong, words in (
        (None, r"targets\[0\]: has no pixel_classes"),
        (classes[:8], r"pixel_classes \(8, 80\); give \(64, 80\)"),
        (classes + 1, "pixel_classes has 4; give 0 to 3, and 255 for none"),
        (classes - 1, "pixel_classes has -1; give 0 to 3"),
    ):
        with pytest.raises(aligndet.DataError, match=words):
            detector(images, target(masks=masks, pixel_classes=wrong))


def test_a_small_image_alone_is_too_little_for_batch_norm(chain: Path) -> None:
    config = {"resolution": {"short_side": [64], "long_side": 64}}  # of which the last map is a single pixel
    detector = aligndet.load(chain / "finetune" / "retinanet-resnet18", config=config)
    with pytest.raises(aligndet.RunError, match="a single image per process this small: raise the batch size"):
        detector([torch.rand(3, 64, 64)], target())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one.half(), "weights of torch.float16, not of float32"),
        (lambda one: one.double(), "weights of torch.float64"),
        (lambda one: one.to("meta"), "weights on the device meta"),
    ],
    ids=["half", "double", "meta"],
)
def test_weights_of_another_kind_are_said(
    change: Callable[[aligndet.ImageDetector], aligndet.ImageDetector], words: str, tmp_path: Path
) -> None:
    detector = change(of_family("fcos", tmp_path))
    image = torch.rand(3, 64, 64)
    for call in (
        lambda: detector([image], target()),
        lambda: detector.predict(image),
        lambda: detector.eval()([image]),
    ):
        with pytest.raises(aligndet.ConfigError, match=words):
            call()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("nofile.jpg", "nofile.jpg: no such image file"),
        (np.zeros((8, 8), np.uint8), r"images\[0\]: is an array \(8, 8\) of uint8"),
        (np.zeros((8, 8, 3)), "of float64"),
        (7, "images: are of type int; give a path"),
        ([None], r"images\[0\]: is of type NoneType; give a path"),
        (b"photo.jpg", "images: are of type bytes"),
        (io.BytesIO(b"a file"), "images: are of type BytesIO"),
        ({"a": "photo.jpg"}, "images: are of type dict"),
        (torch.zeros(3, 8, 8, device="meta"), "without values of its own"),
        (torch.zeros(3, 8, 8).to_sparse(), "a sparse one"),
    ],
)
def test_no_image_is_said(image: object, words: str, detector: aligndet.ImageDetector) -> None:
    with pytest.raises(aligndet.DataError, match=words):
        detector.predict(image)  # type: ignore[arg-type]


def test_a_saved_detector_is_loaded_as_it_is(
    detector: aligndet.ImageDetector, photos: list[Path], tmp_path: Path
) -> None:
    detector.save(tmp_path / "mine.pt")
    again = aligndet.load(tmp_path / "mine.pt")
    (expected,), (found,) = (one.predict(photos[0], score=0.0) for one in (detector, again))
    assert again.names == detector.names
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(aligndet.ConfigError, match="no such folder"):
        detector.save(tmp_path / "nowhere" / "mine.pt")


def test_short_sides_are_drawn_in_training(chain: Path) -> None:
    config = {"resolution": {"short_side": [64, 96], "long_side": 128}}
    detector = aligndet.load(chain / "pretrain-box" / "retinanet-resnet18", num_classes=2, config=config)
    seen: list[int] = []
    detector.model.register_forward_pre_hook(lambda _, inputs: seen.extend(map(min, inputs[0].sizes_hw)))
    for _ in range(12):
        one = {"boxes": torch.tensor([[1.0, 2, 30, 40]]), "labels": torch.tensor([1])}
        detector([torch.rand(3, 50, 60)] * 2, [one] * 2)
    assert set(seen) == {64, 96}
    assert detector.test_sides == (96, 128)
