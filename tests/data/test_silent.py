"""What was once passed over without a word: it is used, or counted and said."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.doctor import _duplicate_pairs, check_data
from aligndet_cli.data.open import open_images
from helpers.data_sets import coco_content, make_coco, make_voc, make_yolo, voc_xml

BOX = "0 .5 .5 .5 .5\n"


def told(root: Path, severity: str) -> dict[str, int]:
    report = check_data(DataConfig(root=root), num_threads=1)
    return {
        item.code: item.count
        for item in report.findings
        if item.severity == severity and item.code != "duplicate-images"
    }


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (unicodedata.normalize("NFD", "é"), unicodedata.normalize("NFC", "é") + ".txt"),
        ("a", "a.TXT"),
        ("a", "a.jpg.txt"),
        ("a", "A.txt"),
    ],
)
def test_label_files_of_no_image_are_told(tmp_path: Path, image: str, label: str) -> None:
    make_yolo(tmp_path, {f"train/{image}": None, "train/b": BOX, "val/c": BOX})
    (tmp_path / "labels" / "train" / label).write_text(BOX)
    assert told(tmp_path, "warning") == {"unmatched-labels": 1}


def test_label_files_of_no_image_alone_are_fine(tmp_path: Path) -> None:
    """A part of the images may have been taken away."""
    make_yolo(tmp_path, {"train/b": BOX, "val/c": BOX})
    (tmp_path / "labels" / "train" / "gone.txt").write_text(BOX)
    assert told(tmp_path, "warning") == {}


@pytest.mark.parametrize("place", ["", "Segmentation"])
def test_lists_outside_of_main_are_lists(tmp_path: Path, place: str) -> None:
    make_voc(tmp_path, dict.fromkeys("abc", voc_xml(("cat", (1, 1, 9, 9)))), {})
    folder = tmp_path / "ImageSets" / place
    folder.mkdir(exist_ok=True)
    (folder / "train.txt").write_text("a\nb\n")
    (folder / "val.txt").write_text("c\n")
    assert len(open_images(DataConfig(root=tmp_path), purpose="train")) == 2
    assert len(open_images(DataConfig(root=tmp_path), purpose="val")) == 1


@pytest.mark.parametrize(
    "line", ["JPEGImages/{0}.jpg Annotations/{0}.xml", "./JPEGImages/{0}.jpg\t./Annotations/{0}.xml"]
)
def test_lists_of_images_and_annotations_are_lists(tmp_path: Path, line: str) -> None:
    make_voc(tmp_path, dict.fromkeys(["a b", "c"], voc_xml(("cat", (1, 1, 9, 9)))), {})
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n".join(line.format(name) for name in ["a b", "c"]))
    assert open_images(DataConfig(root=tmp_path), purpose="train").file_names == ["a b.jpg", "c.jpg"]


@pytest.mark.parametrize("area", [-1, 1e12])
def test_an_area_that_no_image_has_is_that_of_the_box(tmp_path: Path, area: float) -> None:
    content = coco_content()
    content["annotations"][0]["area"] = area
    make_coco(tmp_path, content)
    images = open_images(DataConfig(root=tmp_path), purpose="train")
    assert images.problems == {"odd areas": 1} and images.areas.tolist() == [11.5, 200, 100]


def test_a_set_without_a_split_to_train_on_is_told(tmp_path: Path) -> None:
    make_coco(tmp_path, split="val2017")
    assert told(tmp_path, "warning") == {"no-training-split": 1}


def test_a_validation_split_without_boxes_is_told(tmp_path: Path) -> None:
    make_yolo(tmp_path, {"train/b": BOX, "val/c": None})
    assert told(tmp_path, "warning") == {"no-boxes": 1}


def test_boxes_to_ignore_are_not_called_crowds(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][1]["ignore"] = 1
    make_coco(tmp_path, content)
    assert told(tmp_path, "warning") == {"ignored-boxes": 1} and told(tmp_path, "info")["crowds"] == 1


def test_pairs_that_coincide_are_those_of_comparing_all_with_all() -> None:
    random = np.random.default_rng(0)
    corners = random.uniform(0, 8, (300, 2)).round(0)
    boxes = np.concatenate([corners, corners + random.uniform(20, 24, (300, 2)).round(0)], axis=1).astype(np.float32)
    class_ids = random.integers(0, 3, 300)
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    sides = np.clip(np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - low, 0, None).astype(np.float64)
    overlap, areas = sides.prod(axis=2), (boxes[:, 2:] - boxes[:, :2]).astype(np.float64).prod(axis=1)
    is_pair = overlap > 0.9 * (areas[:, None] + areas[None] - overlap)
    is_pair &= class_ids[:, None] == class_ids[None]
    assert _duplicate_pairs(boxes, class_ids) == np.triu(is_pair, k=1).sum() > 20
