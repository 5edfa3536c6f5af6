"""Published low-data folds, and the files that hold them."""

import json
from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.folds import SplitConfig, fraction_of, write_folds
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import ConfigError, DataError
from helpers.commandline import aligndet
from helpers.data_sets import coco_content, make_coco, make_voc, voc_xml

NUM_COCO = 118_287


def test_folds_are_those_of_the_field() -> None:
    # RandomState(1).choice(10, 2, replace=False), NumPy's frozen legacy generator: [2 9]
    assert fraction_of(10, 20, 1) == [2, 9]
    assert fraction_of(10, 100, 1) == list(range(10))
    with pytest.raises(ConfigError, match="leaves none"):
        fraction_of(10, 1, 1)


def test_one_percent_of_coco_is_the_published_fold(tmp_path: Path) -> None:
    """Ids are not positions: image number i of the file has id (7919 i) modulo the number of images, plus 1."""
    ids = [7919 * i % NUM_COCO + 1 for i in range(NUM_COCO)]
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in ids], "annotations": [], "categories": []}
    whole = tmp_path / "instances_train2017.json"
    whole.write_text(json.dumps(content))
    config = SplitConfig(data=DataConfig(annotations=whole), fractions=(1,), folds=(1,), unlabeled=True)
    fold, rest = write_folds(config)
    # The first numbers of RandomState(1).choice(118_287, 1182, replace=False), and their sum; 1182 = int(1182.87)
    positions = np.random.RandomState(1).choice(NUM_COCO, 1182, replace=False)
    assert positions[:5].tolist() == [105285, 107335, 49358, 65744, 101669] and positions.sum() == 68109903
    assert fold.file == tmp_path / "semi_supervised" / "instances_train2017.1@1.json"
    found = [image["id"] for image in json.loads(fold.file.read_text())["images"]]
    assert found == [ids[position] for position in sorted(positions)]  # in the order of the full file
    left_out = {image["id"] for image in json.loads(rest.file.read_text())["images"]}
    assert rest.file.name == "instances_train2017.1@1-unlabeled.json"
    assert not left_out & set(found) and len(left_out) + len(found) == NUM_COCO


def test_folds_have_the_sizes_of_the_paper() -> None:
    # Rounded down: one percent is 1182.87 images.
    for percent, count in ((1, 1182), (5, 5914), (10, 11828), (20, 23657)):
        folds = [fraction_of(NUM_COCO, percent, fold) for fold in range(1, 6)]
        assert {(len(fold), len(set(fold))) for fold in folds} == {(count, count)}
        assert len({tuple(fold) for fold in folds}) == 5


def test_a_fold_is_a_data_set(tmp_path: Path) -> None:
    """Training on a written fold equals --fraction, and its images are found without naming their folder."""
    content = {**coco_content(), "info": {"year": 2017}, "licenses": [{"id": 5}]}
    make_coco(tmp_path, content)
    words = ("split", tmp_path, "--fractions", "40,70", "--folds", "3", "--json")
    files = aligndet(*words).json()["files"]
    assert [(file["num_images"], file["fold"], file["percent"]) for file in files] == [(1, 3, 40), (2, 3, 70)]
    whole = open_images(DataConfig(root=tmp_path), purpose="train")
    for file, percent in zip(files, (40, 70), strict=True):
        written = json.loads(Path(file["file"]).read_text())
        assert written["info"] == {"year": 2017} and written["licenses"] == [{"id": 5}]
        assert written["categories"] == content["categories"]
        images = open_images(DataConfig(root=tmp_path, annotations=file["file"]), purpose="train")
        expected = sorted(fraction_of(3, percent, 3))
        assert images.file_names == [whole.file_names[index] for index in expected]
        assert len(images.boxes) == sum(len(whole.record(index).boxes) for index in expected) == file["num_boxes"]
    # In the folder of the labels it is a split of its own, and not the default for training.
    write_folds(
        SplitConfig(data=DataConfig(root=tmp_path), fractions=(70,), folds=(3,), output=tmp_path / "annotations")
    )
    assert len(open_images(DataConfig(root=tmp_path, split="train2017.3@70"), purpose="train")) == 2
    assert open_images(DataConfig(root=tmp_path), purpose="train").split == "train2017"


def test_voc_becomes_coco(tmp_path: Path) -> None:
    box = voc_xml(("cat", (1, 1, 9, 9)))
    make_voc(tmp_path / "voc", {"a": box, "b": box, "c": box}, {"train": ["c", "a", "b"]})
    data = DataConfig(root=tmp_path / "voc")
    (fold,) = write_folds(SplitConfig(data=data, fractions=(50,), folds=(1,), output=tmp_path / "folds"))
    assert fold.file.name == "instances_train.1@50.json" and (fold.num_images, fold.num_boxes) == (1, 1)
    again = DataConfig(annotations=fold.file, images=tmp_path / "voc" / "JPEGImages")
    images, whole = open_images(again, purpose="train"), open_images(data, purpose="train")
    assert images.file_names == [whole.file_names[index] for index in fraction_of(3, 50, 1)]
    assert images.categories == whole.categories and images.boxes.tolist() == [[0, 0, 9, 9]]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    make_coco(tmp_path)
    assert "fractions.0" in aligndet("split", tmp_path, "--fractions", "100", code=2).error_line()
    assert "leaves none" in aligndet("split", tmp_path, "--fractions", "1", code=2).error_line()
    assert "which data" in aligndet("split", code=2).error_line()
    (tmp_path / "bad.json").write_text('{"images": [{}], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match=r"images\[0\] has no 'id'"):
        write_folds(SplitConfig(data=DataConfig(annotations=tmp_path / "bad.json")))


def test_nothing_is_written_where_a_fold_cannot_be(tmp_path: Path) -> None:
    make_coco(tmp_path, coco_content())
    words = ("split", tmp_path, "-o", tmp_path / "folds", "--fractions")
    assert "leaves none" in aligndet(*words, "50,0.01", code=2).error_line() and not (tmp_path / "folds").exists()
    assert "4294967295" in aligndet(*words, "50", "--folds", str(2**32), code=2).error_line()
    assert "is a folder" in aligndet("split", "--annotations", tmp_path, code=3).error_line()
    assert len(aligndet(*words, "50", "--folds", "1,1", "--json").json()["files"]) == 1
