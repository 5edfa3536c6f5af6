import json
from pathlib import Path
from typing import Any

import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.doctor import check_data
from aligndet_cli.data.open import locate_data, open_images
from aligndet_cli.data.stray import describe_stray_labels
from aligndet_cli.errors import DataError
from helpers.data_sets import coco_content, make_image, voc_xml

LABELS = coco_content()
COCO = json.dumps(LABELS)
CAPTIONS = json.dumps({**LABELS, "annotations": [{"id": 1, "image_id": 20, "caption": "a dog"}]})
PANOPTIC = json.dumps({**LABELS, "annotations": [{"image_id": 20, "segments_info": [{"id": 1, "bbox": [1, 1, 2, 2]}]}]})
PROPOSALS = json.dumps({**LABELS, "annotations": [{**entry, "score": 0.5} for entry in LABELS["annotations"]]})
LABELME = json.dumps({"version": "5.0", "shapes": [], "imagePath": "a.jpg", "imageData": None})
NO_ANNOTATIONS = json.dumps({"images": LABELS["images"], "categories": LABELS["categories"]})
ELSEWHERE = json.dumps({**LABELS, "images": [{"id": 1, "file_name": "/label-studio/data/x.jpg"}]})
YOLO = "0 .5 .5 1 1"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jpg"):
            make_image(file)
        else:
            file.write_text(text)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        # Two files of labels that do not tell their splits.
        (
            {"annotations/one.json": COCO, "annotations/two.json": COCO, "images/a.jpg": ""},
            "{}/annotations/one.json, {}/annotations/two.json look like COCO labels: choose with --annotations FILE",
        ),
        (
            {"annotations/train.json": COCO, "train.json": COCO, "images/a.jpg": ""},
            "{}/train.json, {}/annotations/train.json look like COCO labels",
        ),
        ({"train.json": COCO, "my_train.json": COCO, "train/a.jpg": ""}, "{}/my_train.json, {}/train.json look like"),
        ({"train.json": COCO, "valid.json": COCO, "val.json": COCO, "images/a.jpg": ""}, "look like COCO labels"),
        # Images of one name in two folders, either of which may be meant.
        ({"labels.json": COCO, "data/a.jpg": "", "images/a.jpg": ""}, "--images {}/data or {}/images"),
        # No image where images usually lie.
        ({"labels.json": COCO, "odd/a.jpg": ""}, "--annotations {}/labels.json --images {}/odd"),
        ({"result.json": ELSEWHERE, "images/a.jpg": ""}, "--annotations {}/result.json --images {}/images"),
        (
            {"deep/er/labels.json": COCO, "deep/er/data/a.jpg": ""},
            "--annotations {}/deep/er/labels.json --images {}/deep/er/data",
        ),
        # Labels of two formats.
        (
            {"labels.json": COCO, "a.jpg": "", "a.xml": voc_xml()},
            "labels of coco and voc lie there: choose with --format",
        ),
        (
            {"a.xml": voc_xml(), "a.txt": YOLO, "classes.txt": "cat", "a.jpg": ""},
            "labels of voc and yolo lie there: choose with --format voc|yolo",
        ),
        # XML files whose images are not found by their place, or that are none of VOC.
        ({"a.jpg": "", "boxes/a.xml": voc_xml(), "boxes/b.xml": ""}, "2 .xml files lie in {}/boxes: move them"),
        ({"one/a.jpg": "", "two/a.jpg": "", "one/a.xml": voc_xml()}, "1 .xml files lie beside the images: move them"),
        ({"a.jpg": "", "a.xml": "<gpx><name>x</name></gpx>"}, "1 .xml files lie beside the images: move them"),
        # YOLO without, or with more than one list of classes.
        (
            {"images/a.jpg": "", "labels/a.txt": YOLO},
            "1 .txt files look like YOLO labels, first {}/labels/a.txt: write {}/classes.txt with one class per line",
        ),
        ({"a.jpg": "", "a.txt": YOLO, "notes.txt": ""}, "1 .txt files look like YOLO labels"),
        (
            {"train/a.jpg": "", "train/a.txt": YOLO, "train/classes.txt": "a\nb", "val/classes.txt": "b\na"},
            "{}/train/classes.txt and {}/val/classes.txt list other classes: write a {}/data.yaml",
        ),
        (
            {"images/a.jpg": "", "labels/a.txt": YOLO, "classes.txt": "a\nb", "train.txt": "/gone/images/a.jpg"},
            "1 .txt files look like YOLO labels",
        ),
    ],
)
def test_labels_that_no_layout_takes_are_named_with_the_way_out(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    write(tmp_path, files)
    assert locate_data(tmp_path).format == "folder"
    assert said.replace("{}", str(tmp_path)) in describe_stray_labels(tmp_path)
    (finding,) = (item for item in check_data(DataConfig(root=tmp_path)).findings if item.code == "no-labels")
    assert finding.severity == "warning" and said.replace("{}", str(tmp_path)) in finding.message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", COCO),
        ("settings.json", '{"images": 3}'),
        (".hidden/labels.json", COCO),
        ("empty.json", ""),
        ("readme.md", COCO),
        ("captions_train.json", CAPTIONS),
        ("proposals.json", PROPOSALS),
        ("panoptic_train.json", PANOPTIC),
        ("image_info_test.json", NO_ANNOTATIONS),
        ("cut.json", COCO[:60]),
        ("list.json", "[1, 2]"),
        ("deep.json", '{"images": [' + "[" * 100_000),
        ("classes.txt", "cat\ndog"),
        ("train.txt", "a.jpg"),
    ],
)
def test_other_files_are_no_labels(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, {"classes.txt": "cat\ndog", "a.jpg": "", name: text})
    assert describe_stray_labels(tmp_path) == ""
    assert not open_images(DataConfig(root=tmp_path), purpose="train").has_labels


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_of_several_formats_one_may_be_asked_for(tmp_path: Path, kind: Any) -> None:
    text = {"labels.json": COCO, "a.xml": voc_xml(("cat", (1, 1, 9, 9))), "a.txt": YOLO, "classes.txt": "cat"}
    write(tmp_path, {"a.jpg": "", "b.jpg": "", "c.jpg": "", **text})
    assert open_images(DataConfig(root=tmp_path, format=kind), purpose="train").format == kind
    assert not open_images(DataConfig(root=tmp_path), purpose="train").has_labels


@pytest.mark.parametrize("text", ["\ncat\ndog", "cat\n\ndog\n", "\ufeff\ncat", "\n\n"])
def test_a_blank_line_among_classes_is_one_line_since_lines_are_counted(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"images/a.jpg": "", "labels/a.txt": YOLO, "classes.txt": text})
    with pytest.raises(DataError, match=r"classes\.txt:\d: blank line; class numbers count the lines"):
        open_images(DataConfig(root=tmp_path), purpose="train")


def test_a_class_that_the_list_lacks_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, {"images/a.jpg": "", "labels/a.txt": "2 .5 .5 1 1", "classes.txt": "cat\ndog\n"})
    with pytest.raises(DataError, match=r"a\.txt:1: class 2 is not among the 2 classes of classes\.txt"):
        open_images(DataConfig(root=tmp_path), purpose="train")


@pytest.mark.parametrize("name", ["a.json", "a.jpg.json"])
def test_labels_of_other_tools_are_named(tmp_path: Path, name: str) -> None:
    make_image(tmp_path / "a.jpg")
    (tmp_path / name).write_text(LABELME)
    assert "1 .json files have the names of images" in describe_stray_labels(tmp_path)
