import shutil
from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.folder import class_tree_splits, folder_classes
from aligndet_cli.pretrain_image.labels import ImageData, open_data

NAMES = ("cross", "disc", "square", "star", "triangle")


def opened(root: Path, tmp_path: Path, **more: object) -> ImageData:
    return open_data(DataConfig(root=root, **more), seed=0, index_dir=tmp_path / "index")


def test_classes_are_the_first_folders() -> None:
    classes = folder_classes(["b/1.jpg", "a/x/2.jpg", "b/3.jpg"])
    assert classes is not None and classes.names == ("a", "b") and classes.class_ids.tolist() == [1, 0, 1]
    assert folder_classes(["a/1.jpg", "2.jpg"]) is None  # one image has no class
    assert folder_classes(["a/1.jpg", "a/2.jpg"]) is None


def test_a_tree_with_splits(objects: Path, tmp_path: Path) -> None:
    assert class_tree_splits(objects) == ("train", "val") and class_tree_splits(objects / "train") is None
    data = opened(objects, tmp_path)
    assert data.images.split == "train" and data.indices == list(range(23))
    assert data.classes is not None and data.classes.names == NAMES
    assert data.probe is not None and (len(data.probe.train), len(data.probe.test)) == (23, 13)
    assert data.probe.test.image_set.split == "val" and data.probe.test.boxes is None
    for regions in (data.probe.train, data.probe.test):  # every image has the class that its folder says
        names = [regions.image_set.file_names[index].split("/")[0] for index in regions.image_index]
        assert [NAMES[number] for number in regions.class_ids] == names


def test_validation_classes_are_numbered_as_in_training(objects: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(objects, tmp_path / "objects"))
    shutil.rmtree(root / "val" / "cross")
    (root / "val" / "square").rename(root / "val" / "zebra")
    data = opened(root, tmp_path)
    assert data.probe is not None
    assert set(data.probe.test.class_ids.tolist()) == {1, 3, 4}  # disc, star, triangle; nobody knows zebras


def test_without_a_validation_split_a_fifth_is_held_out(objects: Path, tmp_path: Path) -> None:
    data = opened(objects / "train", tmp_path)
    assert data.probe is not None and len(data.probe.test) == 5 and len(data.probe.train) == 18
    held_out = set(data.probe.test.image_index.tolist())
    assert not held_out & set(data.probe.train.image_index.tolist())
    assert set(data.indices) == set(range(23)) - held_out  # what is tested on was never seen
    assert opened(objects / "train", tmp_path).indices == data.indices


def test_boxes_are_regions(toy: Path, tmp_path: Path) -> None:
    data = opened(toy, tmp_path)
    assert data.classes is None and data.images.split == "train" and data.indices == list(range(13))
    assert data.probe is not None and data.probe.train.boxes is not None and data.probe.test.boxes is not None
    assert data.probe.test.image_set.split == "val"
    assert len(data.probe.train) == len(data.images.boxes) and set(data.probe.train.class_ids) == set(range(5))
    assert (np.diff(data.probe.train.image_index) >= 0).all()
    # Trained on the validation split, the probe must not find the same boxes on both sides.
    data = opened(toy, tmp_path, split="val")
    assert data.probe is not None and data.probe.train.image_set is data.probe.test.image_set
    assert not set(data.probe.train.image_index) & set(data.probe.test.image_index)


def test_plain_images_have_no_probe(toy: Path, tmp_path: Path) -> None:
    data = opened(toy / "train", tmp_path)
    assert data.probe is None and data.classes is None and data.fingerprint == data.images.fingerprint


@pytest.mark.parametrize("count", [1, 4, 23, 99])
def test_limits_keep_to_the_whole_set(objects: Path, tmp_path: Path, count: int) -> None:
    probe = opened(objects, tmp_path).probe
    assert probe is not None
    limited = probe.train.limited(count)
    assert len(limited) == min(count, 23) and len(set(limited.image_index.tolist())) == len(limited)
    if 1 < count < 23:
        assert limited.image_index[0] == 0 and limited.image_index[-1] == 22
