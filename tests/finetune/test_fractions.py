"""A part of the labelled images is trained on alike, whichever way it is named."""

from pathlib import Path

import pytest

from aligndet_cli.data.toy import draw_toy_data
from helpers.commandline import aligndet


@pytest.mark.parametrize(
    ("family", "key", "expected"),
    [
        # 50 epochs of all 24 images, 16 to a step, with a warm-up; of the 6 images alone it would be 50 steps.
        ("detr", "steps", "100 (linear warm-up 10, /10 at [80])"),
        ("fcos", "steps", "12 (constant warm-up 1, /10 at [8, 11])"),
        ("fcos", "gradient clipping", "off"),
    ],
)
def test_fold_files_train_as_fractions_do(tmp_path: Path, family: str, key: str, expected: str) -> None:
    toy, folds = tmp_path / "toy", tmp_path / "folds"
    draw_toy_data(toy, seed=0, num_train=24, num_val=2, size_hw=(64, 80))
    for folder in (folds, toy / "annotations"):
        aligndet("split", toy, "--split", "train", "--fractions", "25", "--folds", "1", "-o", folder)
    file = folds / "instances_train.1@25.json"
    ways = [
        (toy, "--fraction", "25", "--fold", "1"),
        (toy, "--annotations", file),
        ("--annotations", file, "--images", toy / "train"),
        (toy, "--split", "train.1@25"),
    ]
    words = ("-w", tmp_path / "w", "--detector", family, "--backbone", "resnet18", "--init", "scratch", "-n", "--json")
    for way in ways:
        effective = aligndet("finetune", *way, *words).json()["effective"]
        assert effective[key] == expected, way
        assert effective["images"].startswith("6 (")
