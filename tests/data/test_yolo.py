from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.doctor import check_data
from aligndet_cli.data.open import open_images
from aligndet_cli.data.yolo_yaml import YoloConfig, read_yolo_config
from aligndet_cli.errors import DataError
from helpers.data_sets import make_image, make_yolo


def open_root(root: Path, split: str | None = None, *, with_masks: bool = False) -> ImageSet:
    return open_images(DataConfig(root=root, split=split), purpose="train", with_masks=with_masks)


def test_boxes_polygons_and_negatives_are_read(tmp_path: Path) -> None:
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


def test_overhanging_and_empty_boxes_are_corrected(tmp_path: Path) -> None:
    make_yolo(tmp_path, {"train/a": "0 0 0 1 1\n0 .5 .5 0 .1\n0 .5 .5 -.1 -.1\n0 1.9 1.9 .1 .1\n"})
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
        # Numbers that cannot be a polygon: a box and key points, or pixels.
        ("0 .5 .5 .2 .2 .1 .1 2", r"8 numbers, expected .*a box with key points needs 'kpt_shape"),
        ("0 .5 .5 .2 .2 .1 .1 2 .2 .2 2", "2 is no coordinate of a polygon, .*'kpt_shape"),
        ("0 10 10 40 10 40 30", "10 is no coordinate of a polygon"),
    ],
)
def test_bad_label_lines_are_errors(tmp_path: Path, line: str, message: str) -> None:
    make_yolo(tmp_path, {"train/a": line + "\n"})
    with pytest.raises(DataError, match=message):
        open_root(tmp_path)


def test_a_split_may_be_a_list_a_text_file_or_a_roboflow_path(tmp_path: Path) -> None:
    text = "train: [images/one, images/two]\nval: list.txt\ntest: ../images/one\nnc: 1\nnames: ['x']\n"
    make_yolo(tmp_path, {"one/a": "0 .5 .5 1 1", "two/b": ""}, text)
    (tmp_path / "list.txt").write_text("./images/two/b.jpg\nimages/one/a.jpg\n")
    train = open_root(tmp_path)
    assert train.file_names == ["one/a.jpg", "two/b.jpg"] and len(train.boxes) == 1
    assert open_root(tmp_path, "val").file_names == ["one/a.jpg", "two/b.jpg"]
    assert open_root(tmp_path, "test").file_names == ["a.jpg"]
    (tmp_path / "list.txt").write_text("./images/two/gone.jpg\n")
    with pytest.raises(DataError, match=r"gone\.jpg: image listed in the labels is not on disk"):
        open_root(tmp_path, "val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\n", "data.yaml: 'names' must be a list"),
        ("names: [a, b]\n", "names no 'train' or 'val'"),
        ("", "names no 'train' or 'val'"),
        ("train: images/train\nnames: [a]\nnc: 2\n", "'nc' is 2 but 'names' lists 1"),
        ("train: images/train\nnc: 100000000000\n", "more than 1,000,000 classes"),
        ("train: images/nowhere\nnames: [a, b]\n", "which is not there"),
        ("train: {a: b}\nnames: [a]\n", "'train' must be a folder"),
        ("train: images/train\nnames: [[a], b]\n", "'names' must be a list of words"),
        ("train: images/train\nnames:\n- a: b\n", "'names' must be a list of words"),
        ("train: images/train\nnames: {a: b}\n", "'names' must be a list of words"),
        ("- train\n- names\n", "holds no keys"),
        # Faults of YAML are told with their line.
        ("train: images/train\nnames: [a, , b]\n", r"data\.yaml:2: not YAML \(expected the node content"),
        ("train: images/train\nnames:\n\t- a\n", r"data\.yaml:3: not YAML \(found character '\\t'"),
        ("train: images/train\nnames: *absent\n", r"data\.yaml:2: not YAML \(found undefined alias 'absent'\)"),
        ("train: images/train\nnames: [a, b\n", r"data\.yaml:3: not YAML \(expected ',' or '\]'"),
        ("train: images/train\nnames: [a\x07]\n", r"data\.yaml:2: not YAML \(a control character\)"),
        ("train: a\nnames: &n [*n]\n", r"data\.yaml:2: not YAML \(found unconstructable recursive node\)"),
        ("train: a\n---\nnames: [a]\n", r"data\.yaml:2: not YAML \(but found another document\)"),
        ("train: a\nnames: " + "[" * 5000, "cannot be read as YAML"),
        ('train: a\nnames: ["\\UFFFFFFFF"]\n', "cannot be read as YAML"),
    ],
)
def test_bad_yaml_is_an_error_naming_the_file(tmp_path: Path, text: str, message: str) -> None:
    make_yolo(tmp_path, {"train/a": ""})
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        open_images(DataConfig(root=tmp_path / "data.yaml", format="yolo"), purpose="train")
    assert "\n" not in str(raised.value)


def test_what_aliases_repeat_is_bounded(tmp_path: Path) -> None:
    # "Billion laughs": nine times nine times ..., 9**9 words from 500 characters. And a long word, many times.
    nested = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join(['*' + last] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    long = f"a: &a {'x' * 5000}\n"
    assert_refused(tmp_path, f"{nested}train: a\nnames: *i\n", "'names' must be a list of words")
    assert_refused(tmp_path, f"{nested}train: *i\nnames: [a]\n", "'train' must be a folder")
    assert_refused(tmp_path, f"{long}train: a\nnames: [{'*a,' * 500}]\n", "'names' is too large when its aliases")
    assert_refused(tmp_path, f"train: a\nnames: [a]\nx: {'x' * 2**20}\n", "too large for a data.yaml")


def assert_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_text(folder, text)


def read_text(folder: Path, text: str) -> YoloConfig:
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    return read_yolo_config(folder / "data.yaml")


def test_the_keys_of_a_data_yaml_are_read(tmp_path: Path) -> None:
    config = read_text(
        tmp_path,
        "# a comment\npath: ../datasets/coco8 # relative\n"
        "'train': \"images/tr #1\"\n"
        "val:\n  - images/a\n  - 'images/b'\n"
        "test:\n"
        "names:\n  0: person\n  1: 'traffic: light'\n  2: no # stays a word\n"
        "nc: 3\n"
        "download: |\n  import os\n  x: [unclosed\n",
    )
    assert config.splits == {
        "train": [tmp_path / "images/tr #1"],
        "val": [tmp_path / "images/a", tmp_path / "images/b"],
    }
    assert [(c.category_id, c.name) for c in config.categories] == [(0, "person"), (1, "traffic: light"), (2, "no")]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [ 'it''s', \"a,b\",\n  plain word,\n ]\n", ["it's", "a,b", "plain word"]),
        ("names: {1: 'b, c', 0: a}\n", ["a", "b, c"]),
        ("names:\n- yes\n- off\n- 007\n- null\n", ["yes", "off", "007", "null"]),
        ("names: ['#1', a#b, \"c # d\"] # three\n", ["#1", "a#b", "c # d"]),
        ("names: {'0': a}\nnc: '1'\n", ["a"]),
        ("nc: 2\nnames:\n", ["class 0", "class 1"]),
        ("---\nnames: [a]\n...\n", ["a"]),
        ("first: &first cat\nnames: [*first, dog]\n", ["cat", "dog"]),
        ("names:\n  0: >-\n    big\n    cat\n  1: |-\n    dog\n", ["big cat", "dog"]),
        ('names: ["K\\xE4fer", "\\ud83d\\ude00", Käfer]\n', ["Käfer", "\U0001f600", "Käfer"]),
    ],
)
def test_names_may_have_many_forms(tmp_path: Path, text: str, names: list[str]) -> None:
    start = "" if text.startswith("---") else "train: images/train\n"
    config = read_text(tmp_path, start + text.replace("---\n", "---\ntrain: images/train\n"))
    assert [category.name for category in config.categories] == names


@pytest.mark.parametrize("options", [{}, {"default_flow_style": True}, {"allow_unicode": True}, {"explicit_end": True}])
def test_what_pyyaml_writes_is_read(tmp_path: Path, options: dict[str, bool]) -> None:
    names = [
        "Käfer",
        "no",
        "12",
        "a: b",
        "it's",
        "#",
        "null",
        " padded ",
        "long " * 40 + "name",
        "two\nlines",
        "\U0001f600",
    ]
    written: list[str] | dict[int, str]
    for written in (names, dict(enumerate(names))):
        config = read_text(tmp_path, yaml.dump({"train": "images", "names": written, "nc": len(names)}, **options))
        assert [category.name for category in config.categories] == names


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends_change_nothing(tmp_path: Path, end: str) -> None:
    boxes = "0 0.5 0.5 0.5 0.5\n1 0.25 0.25 0.1 0.2\n"
    make_yolo(tmp_path / "clean", {"train/a": boxes})
    make_yolo(tmp_path / "odd", {"train/a": ""}, "train: list.txt\nnames: [cat, dog]\n")
    (tmp_path / "odd/labels/train/a.txt").write_bytes(b"\xef\xbb\xbf" + boxes.replace("\n", end).encode())
    (tmp_path / "odd/list.txt").write_bytes(b"\xef\xbb\xbf./images/train/a.jpg" + end.encode())
    clean, odd = (
        open_images(DataConfig(root=tmp_path / name, split="train"), purpose="train") for name in ("clean", "odd")
    )
    assert len(odd.boxes) == 2 and odd.boxes.tolist() == clean.boxes.tolist()
    assert odd.class_ids.tolist() == clean.class_ids.tolist()


POSE = "train: images/train\nnames: [cat, dog]\nkpt_shape: {}\n"


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("points", [1, 2, 3, 4, 17])
def test_a_box_with_key_points_is_the_box_as_kpt_shape_says(tmp_path: Path, points: int, dimensions: int) -> None:
    number = points * dimensions
    keypoints = " ".join(f"{0.1 + 0.01 * n:.2f}" if n % 3 < 2 or dimensions == 2 else "2" for n in range(number))
    clean, pose = tmp_path / "clean", tmp_path / "pose"
    make_yolo(clean, {"train/a": "1 .5 .5 .4 .4\n0 .3 .3 .2 .2"})
    labels = {"train/a": f"1 .5 .5 .4 .4 {keypoints}\n0 .3 .3 .2 .2 {keypoints}"}
    make_yolo(pose, labels, POSE.format([points, dimensions]))
    found, expected = open_root(pose, with_masks=True), open_root(clean, with_masks=True)
    assert found.boxes.tolist() == expected.boxes.tolist() and found.class_ids.tolist() == [1, 0]
    assert [found.segmentations[row] for row in range(2)] == [[], []]
    (said,) = (item for item in check_data(DataConfig(root=pose, split="train")).findings if item.code == "key-points")
    assert (said.severity, said.count) == ("info", 2) and "key points of 2 boxes are left out" in said.message
    for line in ("1 .5 .5 .4 .4", f"1 .5 .5 .4 .4 {keypoints} .5", "1 .1 .1 .2 .1 .2 .2" + " .1" * (number + 5)):
        (pose / "labels/train/a.txt").write_text(line)
        with pytest.raises(DataError, match=rf"a\.txt:1: .* and {number} for key points, as 'kpt_shape' says"):
            open_root(pose)


@pytest.mark.parametrize("shape", ["17", "[17]", "[0, 2]", "[17, 4]", "[17, x]", "[17, 3, 1]", "{a: b}", "[]"])
def test_a_kpt_shape_that_is_none_is_one_line(tmp_path: Path, shape: str) -> None:
    make_yolo(tmp_path, {"train/a": ""}, POSE.format(shape))
    with pytest.raises(DataError, match=r"data\.yaml: 'kpt_shape' must be the number of key points"):
        open_root(tmp_path)


def test_oriented_boxes_are_the_boxes_around_their_corners(tmp_path: Path) -> None:
    make_yolo(tmp_path, {"train/a": "0 .5 .25 .75 .5 .5 .75 .25 .5"})
    np.testing.assert_allclose(open_root(tmp_path).boxes, [[15, 10, 45, 30]])


@pytest.mark.parametrize("there", ["train", "train val", "train val test", "val", ""])
@pytest.mark.parametrize("form", ["../SPLIT/images", "SPLIT/images"])
def test_splits_that_are_not_there_trouble_only_those_who_ask_for_them(tmp_path: Path, form: str, there: str) -> None:
    root = tmp_path / "export"
    root.mkdir()
    names = {"train": "train", "val": "valid", "test": "test"}
    lines = (f"{split}: {form.replace('SPLIT', folder)}\n" for split, folder in names.items())
    (root / "data.yaml").write_text("".join(lines) + "names: [cat, dog]\n")
    for number, split in enumerate(there.split()):
        make_image(root / names[split] / "images/a.jpg", color=(number, 0, 0))
        (root / names[split] / "labels").mkdir()
        (root / names[split] / "labels/a.txt").write_text("1 .5 .5 .4 .4")
    severities = {"train": "error", "val": "warning", "test": "info"}
    report = check_data(DataConfig(root=root), num_threads=1)
    missing = {item.example: item.severity for item in report.findings if item.code == "missing-splits"}
    assert missing == {split: severity for split, severity in severities.items() if split not in there.split()}
    for split in names:
        if split in there.split():
            assert len(open_root(root, split).boxes) == 1
        else:
            with pytest.raises(DataError, match=rf"data\.yaml: '{split}' names .*, which is not there; correct 'path'"):
                open_root(root, split)


def test_one_reading_of_upward_paths_holds_for_all_splits(tmp_path: Path) -> None:
    # The folder above has training images of its own: they are not those of this export.
    make_yolo(tmp_path, {"train/other": ""})
    root = tmp_path / "export"
    text = "train: ../images/train\nval: ../images/val\nnames: [cat, dog]\n"
    make_yolo(root, {"val/a": "0 .5 .5 1 1"}, text)
    with pytest.raises(DataError, match=rf"'../' may mean {root}/images/val or {tmp_path}/images/train; write"):
        open_root(root)
    (tmp_path / "images/train/other.jpg").unlink()
    (tmp_path / "images/train").rmdir()
    assert len(open_root(root, "val").boxes) == 1


@pytest.mark.parametrize(("train", "val"), [("Train", "Validation"), ("training", "valid"), ("TRAIN", "VAL")])
def test_splits_may_be_spelled_otherwise(tmp_path: Path, train: str, val: str) -> None:
    text = f"{train}: images/train\n{val}: images/val\nnames: [cat, dog]\n"
    make_yolo(tmp_path, {"train/a": "0 .5 .5 1 1", "val/b": ""}, text)
    assert (open_root(tmp_path).file_names, open_root(tmp_path, "val").file_names) == (["a.jpg"], ["b.jpg"])
    (tmp_path / "data.yaml").write_text(text + "val: images/train\n")
    with pytest.raises(DataError, match="names the images of 'val' twice"):
        open_root(tmp_path)


def test_labels_beside_images_count_where_there_is_no_folder_of_labels(tmp_path: Path) -> None:
    root = tmp_path / "images" / "export"  # `images` is a part of the path, but not one of the data set
    make_image(root / "a.jpg")
    (root / "a.txt").write_text("0 .5 .5 1 1")
    (root / "data.yaml").write_text("train: .\nnames: [cat]\n")
    assert len(open_root(root).boxes) == 1
