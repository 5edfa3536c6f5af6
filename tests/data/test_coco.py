import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from aligndet_cli.config import DataConfig
from aligndet_cli.data.coco import find_coco_splits, to_coco_dict
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import DataError
from helpers.data_sets import coco_content, make_coco, make_image


def open_root(root: Path, **settings: Any) -> ImageSet:
    return open_images(DataConfig(root=root, **settings), purpose="train")


def test_a_json_becomes_flat_arrays(tmp_path: Path) -> None:
    make_coco(tmp_path)
    images = open_root(tmp_path)
    # Images keep the order of the json; class ids follow ascending category ids: 4 cat -> 0, 9 dog -> 1.
    assert images.file_names == ["c.jpg", "a.jpg", "b.jpg"] and images.image_ids.tolist() == [30, 10, 20]
    assert [(category.category_id, category.name) for category in images.categories] == [(4, "cat"), (9, "dog")]
    assert images.offsets.tolist() == [0, 2, 2, 3]
    assert images.boxes.tolist() == [[1, 2, 4, 6], [5, 5, 25, 15], [50, 30, 60, 40]]
    assert images.class_ids.tolist() == [0, 1, 1]
    assert images.areas.tolist() == [11.5, 200, 77]  # the second has no area of its own: 20 * 10
    assert images.is_crowd.tolist() == [False, True, False]
    assert images.sizes_hw.tolist() == [[40, 60]] * 3
    assert images.problems == {} and images.segmentations is None
    assert (images.boxes.dtype, images.class_ids.dtype, images.image_ids.dtype) == (np.float32, np.int64, np.int64)
    assert images.record(1).boxes.shape == (0, 4)  # an image without boxes stays, as a negative
    assert images.record(2).path.is_file()


def test_boxes_are_clipped_dropped_and_counted(tmp_path: Path) -> None:
    content = coco_content()
    boxes = [
        [10, 10, 0, 5],  # no width
        [10, 10, 5, -3],  # negative height
        [60, 0, 5, 5],  # starts where the image of width 60 ends
        [-5, -5, 10, 10],  # clipped to 0 0 5 5
        [59.5, 39.5, 1, 1],  # half a pixel over: clipped without a word
        [10, 10, 1e-9, 5],  # vanishes in float32
    ]
    content["annotations"] = [
        {"id": number, "image_id": 10, "category_id": 4, "bbox": box} for number, box in enumerate(boxes)
    ]
    make_coco(tmp_path, content)
    images = open_root(tmp_path)
    assert images.boxes.tolist() == [[0, 0, 5, 5], [59.5, 39.5, 60, 40]]
    assert images.problems == {
        "degenerate boxes": 3,
        "boxes outside the image": 1,
        "boxes clipped to the image": 1,
    }


def test_missing_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    content = coco_content()
    for image in content["images"]:
        del image["width"]
    content["annotations"][0]["bbox"] = [55, 30, 10, 10]
    make_coco(tmp_path, content)
    (tmp_path / "train2017" / "a.jpg").write_bytes(b"not an image")
    images = open_root(tmp_path)
    assert images.sizes_hw.tolist() == [[40, 60], [0, 0], [40, 60]] and images.record(1).size_hw is None
    assert images.aspects([2, 1]).tolist() == [1.5, 1]
    assert images.record(2).boxes.tolist() == [[55, 30, 60, 40]]
    make_coco(tmp_path, content)
    images = open_root(tmp_path)
    assert {(image["height"], image["width"]) for image in to_coco_dict(images)["images"]} == {(40, 60)}


def test_masks_only_when_asked_for(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][1]["segmentation"] = [[1, 2, 4, 2, 4, 6]]
    content["annotations"][2]["segmentation"] = {"size": [40, 60], "counts": [2400]}
    make_coco(tmp_path, content)
    assert open_root(tmp_path).segmentations is None
    images = open_images(DataConfig(root=tmp_path), purpose="train", with_masks=True)
    assert images.segmentations is not None
    assert list(images.segmentations) == [[[1, 2, 4, 2, 4, 6]], {"size": [40, 60], "counts": [2400]}, []]
    assert images.record(0).segmentations[0] == [[1, 2, 4, 2, 4, 6]]
    assert "segmentation" in to_coco_dict(images)["annotations"][0]


def test_to_coco_dict_keeps_ids_and_works_with_pycocotools(tmp_path: Path) -> None:
    make_coco(tmp_path)
    content = to_coco_dict(open_root(tmp_path))
    original = coco_content()
    assert {image["id"]: image["file_name"] for image in content["images"]} == {30: "c.jpg", 10: "a.jpg", 20: "b.jpg"}
    key = ("image_id", "category_id", "iscrowd", "bbox")
    assert sorted([entry[name] for name in key] for entry in content["annotations"]) == sorted(
        [entry[name] for name in key] for entry in original["annotations"]
    )
    file = tmp_path / "again.json"
    file.write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
        assert len(coco.loadRes([{"image_id": 30, "category_id": 4, "bbox": [1, 2, 3, 4], "score": 1.0}]).anns) == 1
    assert sorted(coco.getImgIds()) == [10, 20, 30] and sorted(coco.getCatIds()) == [4, 9]


BREAKAGES = {
    "duplicate image": (lambda c: c["images"].append(dict(c["images"][0])), "image id 30 occurs more than once"),
    "unknown category": (
        lambda c: c["annotations"][1].update(category_id=5),
        r"annotations\[1\] has category id 5, which is not listed \(1 such",
    ),
    "unknown image": (lambda c: c["annotations"][2].update(image_id=7), r"annotations\[2\] has image id 7"),
    "nan": (
        lambda c: c["annotations"][0].update(bbox=[float("nan"), 1, 2, 3]),
        r"annotations\[0\] has the 'bbox' \[nan",
    ),
    "infinite": (lambda c: c["annotations"][0].update(bbox=[1, 1, float("inf"), 3]), "in pixels"),
    "three numbers": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"'bbox' \[1, 2, 3\], expected"),
    "null in box": (
        lambda c: c["annotations"][0].update(bbox=[1, 2, 3, None]),
        "in pixels",
    ),
    "object in box": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, {}]), "expected .x, y, width, height"),
    "no bbox": (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] has no 'bbox'"),
    "text id": (lambda c: c["images"][2].update(id="b"), r"images\[2\] has 'b' for 'id', expected a whole number"),
    "huge id": (lambda c: c["images"][2].update(id=2**70), "does not fit into 64 bits"),
    "not an object": (lambda c: c["annotations"].insert(0, 5), r"annotations\[0\] has no 'image_id'"),
    "no images key": (lambda c: c.pop("images"), "no list 'images'"),
    "no annotations key": (lambda c: c.pop("annotations"), "no list 'annotations'"),
    "no categories key": (lambda c: c.pop("categories"), "no list 'categories'"),
    "duplicate category": (lambda c: c["categories"][0].update(id=4), "categories have equal ids"),
    "climbing": (lambda c: c["images"][0].update(file_name="../c.jpg"), r"'\.\./c\.jpg' points outside"),
    "hidden climbing": (lambda c: c["images"][0].update(file_name="x/../../c.jpg"), "points outside"),
    "absolute": (lambda c: c["images"][0].update(file_name="/etc/passwd"), "points outside"),
    "windows": (lambda c: c["images"][0].update(file_name="..\\c.jpg"), "points outside"),
    "empty": (lambda c: c["images"].clear() or c["annotations"].clear(), "no images in split 'train2017'"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_wrong_content_is_one_line_naming_the_file(tmp_path: Path, name: str) -> None:
    content = coco_content()
    whole = coco_content()
    make_coco(tmp_path, whole)
    change, message = BREAKAGES[name]
    change(content)
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as error:
        open_root(tmp_path)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_half_a_json_is_an_error(tmp_path: Path) -> None:
    file = make_coco(tmp_path)
    content = file.read_bytes()
    for half in (content[: len(content) // 2], b"", b"\xff\xfe\x00", b"[1, 2]", b"null"):
        file.write_bytes(half)
        with pytest.raises(
            DataError, match="instances_train2017.json: (not valid JSON|not UTF-8 text|no list 'images')"
        ):
            open_root(tmp_path)


def test_missing_images_are_counted_and_the_first_named(tmp_path: Path) -> None:
    make_coco(tmp_path)
    (tmp_path / "train2017" / "a.jpg").unlink()
    (tmp_path / "train2017" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"train2017/a\.jpg: .* \(and 1 more\).*--images"):
        open_root(tmp_path)
    assert len(open_root(tmp_path, limit=1)) == 1  # only what is used must be there


def test_a_missing_image_folder_is_an_error(tmp_path: Path) -> None:
    file = make_coco(tmp_path / "made")
    (tmp_path / "labels" / "annotations").mkdir(parents=True)
    file.rename(tmp_path / "labels" / "annotations" / file.name)
    with pytest.raises(DataError, match=r"no such image folder|image listed in the labels is not on disk"):
        open_root(tmp_path / "labels")


def test_images_may_lie_in_subfolders_and_other_layouts(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "deep/er/c.jpg"
    make_coco(tmp_path / "one", content)
    assert open_root(tmp_path / "one").record(0).path == tmp_path / "one/train2017/deep/er/c.jpg"
    make_coco(tmp_path / "two", coco_content())
    (tmp_path / "two/images").mkdir()
    (tmp_path / "two/train2017").rename(tmp_path / "two/images/train2017")
    assert open_root(tmp_path / "two").images_dir == tmp_path / "two/images/train2017"


def test_roboflows_layout_is_read(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        make_coco(tmp_path, split=split).rename(tmp_path / split / "_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    assert list(find_coco_splits(tmp_path)) == ["train", "valid"]
    assert open_images(DataConfig(root=tmp_path), purpose="val").split == "valid"


def test_minicoco_has_the_counts_of_its_readme(shared_data: Path) -> None:
    # Counts: shared/data/minicoco/README.md, table "Counts".
    root = shared_data / "minicoco"
    train, val = open_root(root), open_images(DataConfig(root=root), purpose="val", with_masks=True)
    assert (train.split, len(train), len(train.boxes)) == ("train2017", 128, 929)
    assert (val.split, len(val), len(val.boxes)) == ("val2017", 128, 898)
    assert len(np.unique(train.class_ids)) == 71 and len(train.categories) == 80
    empty = np.flatnonzero(np.diff(train.offsets) == 0)
    assert sorted(train.image_ids[empty].tolist()) == [250, 508]
    assert sum(bool(segmentation) for segmentation in val.segmentations) == 681
    assert train.problems == val.problems == {}
    area_buckets = np.histogram(val.areas, [0, 32**2, 96**2, 1e9])[0]
    assert area_buckets.tolist() == [314, 325, 259]


def test_minicoco_round_trip_equals_the_file(shared_data: Path) -> None:
    root = shared_data / "minicoco"
    original = json.loads((root / "annotations/instances_val2017.json").read_text())
    ours = to_coco_dict(open_images(DataConfig(root=root), purpose="val"))
    # Within an image both are in the order of the file.
    theirs = sorted(original["annotations"], key=lambda entry: entry["image_id"])
    mine = sorted(ours["annotations"], key=lambda entry: entry["image_id"])
    assert [entry["category_id"] for entry in mine] == [entry["category_id"] for entry in theirs]
    np.testing.assert_allclose(
        [entry["bbox"] for entry in mine], [entry["bbox"] for entry in theirs], atol=0.011
    )  # two decimals in the file, so that some boxes end 0.01 beyond the border
    np.testing.assert_allclose([entry["area"] for entry in mine], [entry["area"] for entry in theirs], rtol=1e-6)


def test_duplicate_file_on_disk_is_not_listed_twice(tmp_path: Path) -> None:
    make_coco(tmp_path)
    make_image(tmp_path / "train2017" / "not-in-the-json.jpg")
    assert len(open_root(tmp_path)) == 3


@pytest.mark.parametrize("side", [40, 40.0, "40", "40.0", " 40 ", np.float64(40).item()])
def test_sizes_are_whole_numbers_in_whatever_type(tmp_path: Path, side: Any) -> None:
    content = coco_content()
    content["images"][0]["height"] = side
    make_coco(tmp_path, content)
    assert open_root(tmp_path).sizes_hw.tolist() == [[40, 60]] * 3


@pytest.mark.parametrize("side", [None, 0, "", 0.0])
def test_a_size_that_is_not_told_is_that_of_the_file(tmp_path: Path, side: Any) -> None:
    content = coco_content()
    content["images"][0]["height"] = side
    make_coco(tmp_path, content)
    images = open_root(tmp_path)
    assert images.sizes_hw.tolist() == [[40, 60]] * 3
    assert {(image["height"], image["width"]) for image in to_coco_dict(images)["images"]} == {(40, 60)}


@pytest.mark.parametrize(
    "side", [-40, 40.5, "forty", [40], {}, True, 2**31, 10**400, 2**30, float("nan"), "nan", float("inf")]
)
def test_what_is_no_size_is_one_line(tmp_path: Path, side: Any) -> None:
    content = coco_content()
    content["images"][1]["height"] = side
    make_coco(tmp_path, content)
    with pytest.raises(
        DataError, match=r"images\[1\] has height .* and width 60, expected whole numbers of pixels \(1 such"
    ):
        open_root(tmp_path)


CONVERTED = [
    ("images", "id", [30.0, "30", " 30 ", "+30"]),
    ("annotations", "id", ["1", None, 1.5, 0, -1, 2, 2**53, [], "0b2e7c1a"]),
    ("annotations", "image_id", [20.0, "20", "20.0"]),
    ("annotations", "category_id", [9.0, "9"]),
    ("annotations", "bbox", [["50", "30", 10.0, "1e1"], [50.0, 30, 10, 10]]),
    ("annotations", "area", ["77", 77.0]),
    ("annotations", "iscrowd", [None, False, "0", 0.0, "0.0"]),
    ("annotations", "ignore", [None, False, "0", 0.0]),
    ("categories", "id", [9.0, "9"]),
    ("categories", "supercategory", [None, 5, {}]),
]


@pytest.mark.parametrize(("table", "key", "values"), CONVERTED)
def test_values_of_another_type_are_converted_where_their_meaning_is_certain(
    tmp_path: Path, table: str, key: str, values: list[Any]
) -> None:
    make_coco(tmp_path)
    clean = open_root(tmp_path)
    for value in values:
        content = coco_content()
        content[table][0][key] = value
        make_coco(tmp_path, content)
        odd = open_root(tmp_path)
        assert odd.problems == {}, value
        for name in ("image_ids", "boxes", "class_ids", "areas", "is_crowd"):
            assert getattr(odd, name).tolist() == getattr(clean, name).tolist(), (name, value)


NO_NUMBERS = ["twelve", [], {}, [12], float("inf"), 10**400]
REFUSED = [
    ("images", "id", [None, True, 1.5, *NO_NUMBERS]),
    ("images", "file_name", [None, 5, ["c.jpg"], ""]),
    ("annotations", "image_id", [None, True, 1.5, *NO_NUMBERS]),
    ("annotations", "category_id", [None, False, 1.5, *NO_NUMBERS]),
    ("annotations", "bbox", [None, {}, "1 2 3 4", [], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2], [3, 4]], [1, 2, 3, "x"]]),
    ("annotations", "area", NO_NUMBERS),
    ("annotations", "iscrowd", [2, -1, 0.5, "yes", *NO_NUMBERS]),
    ("annotations", "ignore", [2, "true", *NO_NUMBERS]),
    ("categories", "id", [None, True, *NO_NUMBERS]),
]


@pytest.mark.parametrize(("table", "key", "values"), REFUSED)
def test_values_without_a_certain_meaning_are_one_line_that_names_the_entry(
    tmp_path: Path, table: str, key: str, values: list[Any]
) -> None:
    for value in values:
        content = coco_content()
        file = make_coco(tmp_path, content)
        content[table][0][key] = value
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match=re.escape(str(file))) as error:
            open_root(tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400, value
        assert key in str(error.value) or "file name ''" in str(error.value) or "bits" in str(error.value), value


def test_boxes_to_ignore_are_not_trained_on_but_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = coco_content()
    content["annotations"][1]["ignore"] = 1
    make_coco(tmp_path, content)
    images = open_images(DataConfig(root=tmp_path), purpose="train", with_truths=True)
    assert images.is_crowd.tolist() == [True, True, False] and images.problems == {"ignored boxes": 1}
    assert "1 box has 'ignore': 1: not trained on" in caplog.text
    assert [entry["iscrowd"] for entry in to_coco_dict(images)["annotations"]] == [0, 0, 1]


def test_boxes_all_within_one_pixel_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.25, 0.25, 0.5, 0.5]
    make_coco(tmp_path, content)
    assert open_root(tmp_path).problems == {"relative boxes": 3}
    assert "3 boxes, all within one pixel: relative to the image?" in caplog.text


def test_truths_are_the_boxes_of_the_file(tmp_path: Path) -> None:
    """Neither clipped nor rounded, in the order of the file, with its ids; only of the images that are read."""
    content = coco_content()
    content["annotations"][0]["bbox"] = [0.1, 0.2, 77.7, 0.3]
    content["annotations"][1]["bbox"] = [1, 2, 0, 4]
    make_coco(tmp_path, content)
    images = open_images(DataConfig(root=tmp_path), purpose="train", with_truths=True)
    assert len(images.boxes) == 2
    annotations = to_coco_dict(images)["annotations"]
    assert [entry["id"] for entry in annotations] == [1, 2, 3]
    assert [entry["bbox"] for entry in annotations] == [[0.1, 0.2, 77.7, 0.3], [1, 2, 0, 4], [5, 5, 20, 10]]
    assert [entry["area"] for entry in annotations] == [77, 11.5, 200]
    first = open_images(DataConfig(root=tmp_path, limit=1), purpose="train", with_truths=True)
    assert [entry["id"] for entry in to_coco_dict(first)["annotations"]] == [2, 3]


@pytest.mark.parametrize("name", ["sub\\c.jpg", "sub/c.jpg", "sub\\deeper\\c.jpg"])
def test_windows_separators_are_turned(tmp_path: Path, name: str) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = name.replace("\\", "/")
    file = make_coco(tmp_path, content)
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    assert open_root(tmp_path).file_names[0] == name.replace("\\", "/")
