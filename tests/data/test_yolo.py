from pathlib import Path

import numpy as np
import pytest
from builders import make_yolo
from PIL import Image

from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.open import open_images
from aligndet_cli.data.yaml_subset import read_yaml_keys
from aligndet_cli.errors import DataError


def open_root(root: Path, split: str | None = None, *, with_masks: bool = False) -> ImageSet:
    return open_images(DataConfig(root=root, split=split), purpose="train", with_masks=with_masks)


def test_boxes_polygons_and_negatives(tmp_path: Path) -> None:
    labels = {
        "train/a": "1 0.5 0.5 0.5 0.25\n\n0 0.1 0.2 0.4 0.2 0.4 0.6\n",
        "train/b": "",
        "train/c": None,
        "val/d": "0 0.5 0.5 1 1\n",
    }
    make_yolo(tmp_path, labels)
    images = open_root(tmp_path, with_masks=True)
    assert (images.format, images.split) == ("yolo", "train")
    assert images.file_names == ["a.jpg", "b.jpg", "c.jpg"] and images.offsets.tolist() == [0, 2, 2, 2]
    # 60 wide, 40 high: centre 30 20, sides 30 10; the polygon spans 6..24 and 8..24.
    np.testing.assert_allclose(images.boxes, [[15, 15, 45, 25], [6, 8, 24, 24]], rtol=1e-6)
    assert images.class_ids.tolist() == [1, 0]
    assert images.segmentations[0] == []
    np.testing.assert_allclose(images.segmentations[1], [[6, 8, 24, 8, 24, 24]])
    assert [(category.category_id, category.name) for category in images.categories] == [(0, "cat"), (1, "dog")]
    val = open_images(DataConfig(root=tmp_path / "data.yaml"), purpose="val")
    assert (val.split, val.boxes.tolist()) == ("val", [[0, 0, 60, 40]])


def test_boxes_refer_to_the_upright_image(tmp_path: Path) -> None:
    make_yolo(tmp_path, {"train/a": "0 0.5 0.5 1 1\n", "val/b": ""})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "images/train/a.jpg", exif=exif)
    images = open_root(tmp_path)
    assert images.boxes.tolist() == [[0, 0, 40, 60]] and images.record(0).size_hw == (60, 40)


def test_overhanging_and_empty_boxes(tmp_path: Path) -> None:
    make_yolo(tmp_path, {"train/a": "0 0 0 1 1\n0 .5 .5 0 .1\n0 .5 .5 -.1 -.1\n0 2 2 .1 .1\n"})
    images = open_root(tmp_path)
    assert images.boxes.tolist() == [[0, 0, 30, 20]]
    assert images.problems == {
        "degenerate boxes": 2,
        "boxes outside the image": 1,
        "boxes clipped to the image": 1,
    }


def test_unreadable_image_keeps_its_place(tmp_path: Path) -> None:
    make_yolo(tmp_path, {"train/a": "0 .5 .5 1 1\n", "train/b": "0 .5 .5 1 1\n"})
    (tmp_path / "images/train/a.jpg").write_text("not a jpeg")
    images = open_root(tmp_path)
    assert len(images) == 2 and images.offsets.tolist() == [0, 0, 1]
    assert images.problems == {"unreadable headers": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 .5 .5 1 1", r"a\.txt:1: class 2 is not among the 2 classes of data.yaml"),
        ("-1 .5 .5 1 1", "class -1 is not among"),
        ("0.5 .5 .5 1 1", "class 0.5 is not a whole number"),
        ("0 .5 .5 1", "4 numbers, expected"),
        ("0 .1 .1 .2 .2 .3", "6 numbers, expected"),
        ("0 .5 .5 one 1", r"a\.txt:1: could not convert"),
        ("0 .5 .5 nan 1", "NaN or infinite"),
        ("0 .5 .5 inf 1", "NaN or infinite"),
    ],
)
def test_bad_label_lines(tmp_path: Path, line: str, message: str) -> None:
    make_yolo(tmp_path, {"train/a": line + "\n"})
    with pytest.raises(DataError, match=message):
        open_root(tmp_path)


def test_split_as_list_text_file_and_roboflow_path(tmp_path: Path) -> None:
    yaml = "train: [images/one, images/two]\nval: list.txt\ntest: ../images/one\nnc: 1\nnames: ['x']\n"
    make_yolo(tmp_path, {"one/a": "0 .5 .5 1 1", "two/b": ""}, yaml)
    (tmp_path / "list.txt").write_text("./images/two/b.jpg\nimages/one/a.jpg\n")
    train = open_root(tmp_path)
    assert train.file_names == ["one/a.jpg", "two/b.jpg"] and len(train.boxes) == 1
    assert open_root(tmp_path, "val").file_names == ["one/a.jpg", "two/b.jpg"]
    assert open_root(tmp_path, "test").file_names == ["a.jpg"]
    (tmp_path / "list.txt").write_text("./images/two/gone.jpg\n")
    with pytest.raises(DataError, match=r"gone\.jpg: image listed in the labels is not on disk"):
        open_root(tmp_path, "val")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images/train\n", "data.yaml: 'names' must list"),
        ("names: [a, b]\n", "names no 'train' or 'val'"),
        ("train: images/train\nnames: [a]\nnc: 2\n", "'nc' is 2 but 'names' lists 1"),
        ("train: images/nowhere\nnames: [a, b]\n", "which is not there"),
        ("train: images/train\nnames: [a, b\n", r"'names' cannot be read \(no closing '\]'\)"),
        ("train: images/train\nnames: *anchor\n", "is not supported"),
    ],
)
def test_bad_yaml(tmp_path: Path, yaml: str, message: str) -> None:
    make_yolo(tmp_path, {"train/a": ""}, yaml)
    with pytest.raises(DataError, match=message):
        open_images(DataConfig(root=tmp_path, format="yolo"), purpose="train")


def test_yaml_forms(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(
        "# a comment\npath: ../datasets/coco8 # relative\n"
        "'train': \"images/tr #1\"\n"
        "val:\n  - images/a\n  - 'images/b'\n"
        "test:\n"
        "names:\n  0: person\n  1: 'traffic: light'\n  2: no # stays a word\n"
        "nc: 3\n"
        "download: |\n  import os\n  x: [unclosed\n"
    )
    assert read_yaml_keys(file, ("path", "train", "val", "test", "names", "nc", "absent")) == {
        "path": "../datasets/coco8",
        "train": "images/tr #1",
        "val": ["images/a", "images/b"],
        "test": None,
        "names": {0: "person", 1: "traffic: light", 2: "no"},
        "nc": 3,
    }
    file.write_text(
        "names: [ 'it''s', \"a,b\",\n  plain word,\n ]\nmap: {0: a, 1: 'b, c'}\nseq:\n- x\n- -1\nnone: []\n"
    )
    assert read_yaml_keys(file, ("names", "map", "seq", "none")) == {
        "names": ["it's", "a,b", "plain word"],
        "map": {0: "a", 1: "b, c"},
        "seq": ["x", -1],
        "none": [],
    }
