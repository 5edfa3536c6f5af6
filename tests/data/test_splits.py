import itertools
from pathlib import Path
from typing import get_args

import pytest

from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from aligndet_cli.data.splits import Purpose, choose_split, find_split
from aligndet_cli.errors import DataError
from helpers.data_sets import make_coco

SPELLINGS = {
    "train": ("train", "Train", "TRAIN", "training"),
    "val": ("val", "valid", "Validation", "VAL"),
    "test": ("test", "Test", "testing"),
}


@pytest.mark.parametrize("others", [[], ["default"], ["all", "cat"]])
def test_splits_are_found_in_every_spelling(others: list[str]) -> None:
    root = Path("data")
    for train, val, test in itertools.product(*SPELLINGS.values()):
        known = [train, val, test, *others]
        for asked in itertools.chain(*SPELLINGS.values()):
            (meaning,) = (word for word, spellings in SPELLINGS.items() if asked in spellings)
            assert find_split(known, asked) == {"train": train, "val": val, "test": test}[meaning]
        assert choose_split(root, known, None, "train") == train
        assert choose_split(root, known, None, "val") == val
        assert choose_split(root, [train, test], None, "val") == test


def test_a_name_as_it_is_written_goes_before_its_other_spellings() -> None:
    known = ["Train", "train", "valid", "val", "Val"]
    for purpose in get_args(Purpose):
        assert find_split(known, purpose) == purpose == choose_split(Path("data"), known, None, purpose)
    assert find_split(["Train", "TRAIN"], "train") is None  # two, and none as it is written
    assert find_split(["train2014", "train2017"], "train2015") is None  # a year is no spelling


def test_no_usual_split_is_both_trained_and_validated_on() -> None:
    for train, val, test in itertools.product(*SPELLINGS.values()):
        for known in ([train, val, "trainval"], [train, val, test, "trainval"], [train, val, test], [train, val]):
            chosen = [choose_split(Path("data"), known, None, purpose) for purpose in get_args(Purpose)]
            expected = ["trainval", test] if {test, "trainval"} <= set(known) else [train, val]
            assert chosen == expected


def test_images_beside_the_labels_of_a_split_in_another_spelling_are_not_taken_without_labels(tmp_path: Path) -> None:
    make_coco(tmp_path, split="train")
    (tmp_path / "Train").symlink_to("train")
    assert open_images(DataConfig(root=tmp_path, split="Train"), purpose="train").has_labels


def test_an_unknown_split_is_one_line_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="data: no split 'x'; known: Train, Validation|data: no split 'x'"):
        choose_split(Path("data"), ["Train", "Validation"], "x", "train")
