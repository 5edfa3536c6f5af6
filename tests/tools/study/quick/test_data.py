import json
from pathlib import Path

import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import DataError
from aligndet_cli.tools.study.quick.data import Sizes, open_labelled
from aligndet_cli.tools.study.quick.fit import fit_settings, short_side
from helpers.data_sets import coco_content, make_coco, make_image


def many(count: int) -> dict[str, object]:
    """Images of 40x60, each with one box of 10x10."""
    content = coco_content()
    content["images"] = [
        {"id": number, "file_name": f"{number}.jpg", "height": 40, "width": 60} for number in range(count)
    ]
    content["annotations"] = [
        {"id": number + 1, "image_id": number, "category_id": 4, "bbox": [5, 5, 10, 10], "iscrowd": 0}
        for number in range(count)
    ]
    return content


def test_without_a_split_to_measure_on_a_fifth_is_held_out(tmp_path: Path) -> None:
    make_coco(tmp_path / "data", many(11))
    data = open_labelled(tmp_path / "data")
    assert (data.num_train, data.num_val) == (9, 2)
    assert "9 images of 'train2017' to train on, 2 to measure on (drawn from 'train2017'" in data.describe()
    folder = tmp_path / "held-out"
    data.write_held_out(folder)
    settings = data.held_out_settings(folder)
    ids = {}
    for table in ("common", "evaluate"):
        paths = {**settings["common"], **settings[table]}
        config = DataConfig(annotations=paths["data.annotations"], images=paths["data.images"])
        ids[table] = set(open_images(config, purpose="train").image_ids.tolist())
    assert ids["common"] | ids["evaluate"] == set(range(11)) and not ids["common"] & ids["evaluate"]
    assert open_labelled(tmp_path / "data").held_out == data.held_out  # always the same ones


def test_the_splits_of_a_data_set_are_taken(tmp_path: Path) -> None:
    make_coco(tmp_path, many(5))
    make_coco(tmp_path, many(3), split="val2017")
    data = open_labelled(tmp_path)
    assert (data.num_train, data.num_val, data.held_out) == (5, 3, [])
    assert data.held_out_settings(tmp_path) == {}
    # 40 by 60 pixels, boxes of 10 pixels: a quarter of the short side
    assert data.sizes() == Sizes(40, 1.5, 0.25)


def test_what_cannot_be_studied_is_one_line(tmp_path: Path) -> None:
    make_image(tmp_path / "photos" / "a.jpg")
    with pytest.raises(DataError, match="no labels for split"):
        open_labelled(tmp_path / "photos")
    make_coco(tmp_path / "few", many(3))
    with pytest.raises(DataError, match="3 labelled images; a study needs 4 at least"):
        open_labelled(tmp_path / "few")
    empty = many(5)
    empty["annotations"] = []
    make_coco(tmp_path / "empty", empty)
    with pytest.raises(DataError, match="no boxes to train on"):
        open_labelled(tmp_path / "empty")
    make_coco(tmp_path / "unmeasured", many(5))
    make_coco(tmp_path / "unmeasured", empty, split="val2017")
    with pytest.raises(DataError, match="'val2017'; .*there is nothing to measure on"):
        open_labelled(tmp_path / "unmeasured")
    with pytest.raises(DataError, match="no such file or folder"):
        open_labelled(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        (Sizes(480, 4 / 3, 0.2), 192),  # BCCD: cells of a fifth of the image get 40 pixels
        (Sizes(200, 1, 0.5), 160),  # large objects
        (Sizes(480, 1.5, 0.03), 320),  # small ones: what a CPU can bear
        (Sizes(96, 1, 0.1), 96),  # images are not blown up
        (Sizes(20, 1, 0.1), 64),  # but for what a detector takes
    ],
)
def test_the_side_fits_objects_and_images(monkeypatch: pytest.MonkeyPatch, sizes: Sizes, side: int) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert short_side(sizes) == side


def test_settings_suit_small_data(tmp_path: Path) -> None:
    make_coco(tmp_path, many(5))
    make_coco(tmp_path, many(3), split="val2017")
    tables = fit_settings(open_labelled(tmp_path), "fcos", "resnet18", tmp_path / "weights.pth")
    assert tables["common"]["training.batch_size"] == 5  # no more than there are
    assert tables["common"]["detector.head_norm"] == tables["common"]["detector.neck_norm"] == "group"
    assert tables["proposals"] == {"min_size": 8}
    assert tables["pretrain-box"]["training.lr"] == 0.01  # what FCOS bears
    assert min(tables["pretrain-box"]["views.short_side"]) >= 32
    assert json.dumps(tables)  # plain values
