import json
from pathlib import Path

import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.doctor import check_data
from aligndet_cli.data.open import open_images
from aligndet_cli.data.stray import describe_stray_labels
from helpers.data_sets import coco_content, make_image, voc_xml

COCO = json.dumps(coco_content())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"annotations/train.json": COCO, "train/a.jpg": ""},
            "--annotations {}/annotations/train.json --images {}/train",
        ),
        ({"result.json": COCO, "images/a.jpg": ""}, "--annotations {}/result.json --images {}/images"),
        ({"_annotations.coco.json": COCO, "a.jpg": ""}, "--annotations {}/_annotations.coco.json --images {}"),
        ({"deep/labels.json": COCO, "deep/data/a.jpg": ""}, "--annotations {}/deep/labels.json --images {}"),
        ({"train/a.jpg": "", "train/a.xml": voc_xml()}, "1 .xml files lie beside the images: move them"),
        ({"a.jpg": "", "xml/a.xml": voc_xml(), "xml/b.xml": ""}, "2 .xml files lie in {}/xml: move them"),
        (
            {"images/a.jpg": "", "labels/a.txt": "0 .5 .5 1 1"},
            "1 .txt files look like YOLO labels, first {}/labels/a.txt",
        ),
        ({"a.jpg": "", "a.txt": "0 .5 .5 1 1", "notes.txt": ""}, "1 .txt files look like YOLO labels"),
    ],
)
def test_labels_that_no_layout_takes_are_named_with_the_way_out(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jpg"):
            make_image(file)
        else:
            file.write_text(text)
    assert said.replace("{}", str(tmp_path)) in describe_stray_labels(tmp_path)
    (finding,) = (item for item in check_data(DataConfig(root=tmp_path)).findings if item.code == "no-labels")
    assert finding.severity == "warning" and said.replace("{}", str(tmp_path)) in finding.message


@pytest.mark.parametrize("name", ["notes.txt", "settings.json", ".hidden/labels.json", "empty.json", "readme.md"])
def test_other_files_are_no_labels(tmp_path: Path, name: str) -> None:
    make_image(tmp_path / "a.jpg")
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("" if name == "empty.json" else COCO if name.startswith(".") else '{"images": 3}')
    assert describe_stray_labels(tmp_path) == ""
    assert not open_images(DataConfig(root=tmp_path), purpose="train").has_labels
