import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_api

from aligndet_cli.config import DataConfig
from aligndet_cli.data.coco import to_coco_dict
from aligndet_cli.data.images import read_image
from aligndet_cli.data.open import open_images
from aligndet_cli.data.toy import CATEGORIES, draw_toy_data, draw_toy_objects
from aligndet_cli.errors import RunError
from helpers.commandline import aligndet

NUM_TRAIN, NUM_VAL = 31, 7


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    draw_toy_data(folder, seed=0, num_train=NUM_TRAIN, num_val=NUM_VAL)
    return folder


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_bytes_depend_on_the_seed_only(toy: Path, tmp_path: Path) -> None:
    draw_toy_data(tmp_path / "same", seed=0, num_train=NUM_TRAIN, num_val=NUM_VAL)
    draw_toy_data(tmp_path / "other", seed=1, num_train=NUM_TRAIN, num_val=NUM_VAL)
    assert digest(tmp_path / "same") == digest(toy) != digest(tmp_path / "other")


def test_an_image_does_not_depend_on_how_many_there_are(toy: Path, tmp_path: Path) -> None:
    draw_toy_data(tmp_path, seed=0, num_train=3, num_val=1)
    for name in ("train/000002.jpg", "val/000000.jpg"):
        assert (tmp_path / name).read_bytes() == (toy / name).read_bytes()
    assert (toy / "train/000000.jpg").read_bytes() != (toy / "val/000000.jpg").read_bytes()


def test_opens_as_a_clean_coco_root(toy: Path) -> None:
    train, val = (open_images(DataConfig(root=toy), purpose=purpose) for purpose in ("train", "val"))
    assert (train.split, len(train), val.split, len(val)) == ("train", NUM_TRAIN, "val", NUM_VAL)
    assert train.problems == val.problems == {}
    assert {category.category_id: category.name for category in train.categories} == CATEGORIES
    assert not set(train.image_ids.tolist()) & set(val.image_ids.tolist())
    for index in range(len(val)):
        assert read_image(val.record(index).path).shape[:2] == val.record(index).size_hw


def test_is_hostile_in_small_ways(toy: Path) -> None:
    train = open_images(DataConfig(root=toy), purpose="train")
    counts = np.diff(train.offsets)
    assert (counts == 0).sum() == 1 and counts.max() > 4
    assert (train.sizes_hw[:, 0] != train.sizes_hw[:, 1]).all()
    height_width = np.repeat(train.sizes_hw, counts, axis=0)
    at_border = (train.boxes[:, :2] == 0).any(axis=1) | (train.boxes[:, 2:] == height_width[:, ::-1]).any(axis=1)
    assert at_border.any() and not at_border.all()
    assert len(np.unique(train.class_ids)) == len(CATEGORIES)


def test_many_objects_are_large_enough_for_proposals(toy: Path) -> None:
    boxes = open_images(DataConfig(root=toy), purpose="train").boxes
    sides = boxes[:, 2:] - boxes[:, :2]
    # The proposals stage drops boxes with a side below 32 pixels.
    assert 0.6 < (sides.min(axis=1) >= 32).mean() < 1
    assert sides.max() / sides.min() > 3


def test_polygons_agree_with_boxes_and_areas(toy: Path) -> None:
    images = open_images(DataConfig(root=toy), purpose="train", with_masks=True)
    content = to_coco_dict(images)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    ratios = []
    for entry in content["annotations"]:
        height, width = sizes[entry["image_id"]]
        merged = mask_api.merge(mask_api.frPyObjects(entry["segmentation"], height, width))
        # Contours run through pixel centres: up to a pixel less on each side than the box.
        left, top, wide, high = entry["bbox"]
        got_left, got_top, got_wide, got_high = mask_api.toBbox(merged)
        assert abs(got_left - left) <= 2 and abs(got_top - top) <= 2
        assert wide - 3 <= got_wide <= wide and high - 3 <= got_high <= high
        assert entry["area"] > 0.2 * wide * high  # nothing but a thin diagonal strip is less
        ratios.append(mask_api.area(merged) / entry["area"])
    assert 0.8 < np.median(ratios) < 1.1


def test_sizes_follow_the_argument(tmp_path: Path) -> None:
    draw_toy_data(tmp_path, seed=0, num_train=5, num_val=0, size_hw=(50, 100))
    images = json.loads((tmp_path / "annotations/instances_train.json").read_text())["images"]
    assert all(44 <= image["height"] <= 56 and 88 <= image["width"] <= 112 for image in images)


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        draw_toy_data(tmp_path / "file", seed=0, num_train=1, num_val=1)


def test_scripts_are_told_what_was_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    told = aligndet("toy", folder, "--train", "3", "--val", "2", "--json").json()
    assert told == {"schema_version": 1, "command": "toy", "folder": str(folder), "train": 3, "val": 2}
    assert [len(list((folder / split).iterdir())) for split in ("train", "val")] == [3, 2]


def test_somebodys_folder_is_not_drawn_into(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    assert aligndet("toy", tmp_path, code=2).error_line().endswith("is not empty; name a new folder")
    assert aligndet("toy", tmp_path / "new", "--seed", "-1", code=2).stdout == ""


def test_objects_lie_in_a_folder_per_class(tmp_path: Path) -> None:
    draw_toy_objects(tmp_path / "a", seed=0, num_train=11, num_val=7)
    draw_toy_objects(tmp_path / "b", seed=0, num_train=5, num_val=7)
    files = sorted(file.relative_to(tmp_path / "a").as_posix() for file in (tmp_path / "a").rglob("*.jpg"))
    assert len(files) == 18 and {file.split("/")[1] for file in files} == set(CATEGORIES.values())
    counts = [sum(file.startswith(f"train/{name}/") for file in files) for name in CATEGORIES.values()]
    assert counts == [3, 2, 2, 2, 2]  # they take turns
    for file in files:  # an image depends on its number alone
        if (tmp_path / "b" / file).exists():
            assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    pixels = read_image(tmp_path / "a" / "train/disc/000000.jpg")
    assert 77 <= pixels.shape[0] <= 99 and 91 <= pixels.shape[1] <= 117  # 88 x 104, 12 % either way
    with pytest.raises(RunError, match="cannot be written"):
        draw_toy_objects(tmp_path / "a" / files[0], seed=0, num_train=1, num_val=0)
