"""`aligndet bench` on sizes that take a moment: what is measured, not how fast it is."""

import re
from pathlib import Path

import pytest
from PIL import Image

from aligndet_cli.detectors.detr import DETRConfig
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.tools.bench.clock import PARTS
from aligndet_cli.tools.bench.images import DrawnPixelClasses
from aligndet_cli.tools.bench.measure import hours_or_days, paper_schedule
from helpers.commandline import NECK, aligndet

TINY = ("--backbone", "resnet18", "--short-side", "64", "--long-side", "96", "--batch-size", "2", "--steps", "2")


@pytest.mark.slow
def test_both_stages_on_drawn_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = aligndet("bench", *TINY, *NECK, "--accelerator", "cpu", "--proposals", "5", "--json")
    content = ran.json()
    assert list(content["stages"]) == ["pretrain-box", "finetune"] and not list(tmp_path.iterdir())
    for stage, timing in content["stages"].items():
        assert timing["stage"] == stage and timing["images_per_s"] == pytest.approx(2 / timing["step_s"])
        assert list(timing["parts_s"]) == list(PARTS) and all(value > 0 for value in timing["parts_s"].values())
        # The parts are laps: what is missing is the moment before the first one and after the last one.
        assert sum(timing["parts_s"].values()) == pytest.approx(timing["step_s"], rel=0.05)
        assert 0 <= timing["data_wait"] < 1 and timing["memory_gb"] > 0.1
    pretraining = content["stages"]["pretrain-box"]
    # 12 epochs of 118,287 images
    assert pretraining["schedule_hours"] * 3600 * pretraining["images_per_s"] == pytest.approx(12 * 118_287)


@pytest.mark.slow
def test_own_images_as_a_table(toy: Path) -> None:
    words = ("--stage", "finetune", "--detector", "mask-rcnn", "--set", "detector.head_features=32")
    table = aligndet("bench", toy, *TINY, *NECK, *words).stdout
    assert "finetune" in table and "pretrain-box" not in table
    for row in ("images/s", "peak memory", "waiting for data", "backbone", "90,000 steps of 16 images"):
        assert row in table, table
    # Hours or days: that depends on the machine.
    assert re.search(r"takes, on one device +[\d.,]+ (hours|days)", table), table


@pytest.mark.slow
def test_htc_with_classes_of_pixels() -> None:
    small = ("--set", "detector.head_features=32", "--set", "detector.roi_samples=16", "--set", "detector.mask_convs=1")
    words = ("--detector", "htc", "--set", "detector.semantic_classes=5", *TINY, *NECK, *small)
    ran = aligndet("bench", *words, "--stage", "finetune", "--accelerator", "cpu", "--json")
    assert ran.json()["stages"]["finetune"]["images_per_s"] > 0
    line = aligndet("bench", *words, "--stage", "pretrain-box", code=2).error_line()
    assert line.endswith("pre-training has no classes of pixels; leave it out, or use --stage finetune")


def test_drawn_classes_of_pixels_are_all_there() -> None:
    classes = DrawnPixelClasses(5).classes_of(3, (11, 7))
    assert classes.shape == (11, 7) and classes.dtype == "uint8" and set(classes.ravel()) == set(range(5))


def test_long_times_are_days() -> None:
    texts = [hours_or_days(hours) for hours in (0.04, 47.94, 48, 100)]
    assert texts == ["0.0 hours", "47.9 hours", "2.0 days", "4.2 days"]


def test_images_without_labels(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (70 + number, 50), (number * 80, 9, 9)).save(tmp_path / f"{number}.jpg")
    line = aligndet("bench", tmp_path, *TINY, code=3).error_line()
    assert "no labels" in line and "--stage pretrain-box" in line
    ran = aligndet("bench", tmp_path, *TINY, *NECK, "--stage", "pretrain-box", "--json")
    assert list(ran.json()["stages"]) == ["pretrain-box"]


def test_a_wrong_setting_is_one_line() -> None:
    line = aligndet("bench", "--stage", "pretrain", code=2).error_line()
    assert "stage: 'pretrain' is not a choice (from --stage); did you mean 'pretrain-box'?" in line


def test_schedules_are_the_papers() -> None:
    retinanet, detr = RetinaNetConfig().RECIPE, DETRConfig().RECIPE
    assert paper_schedule("pretrain-box", retinanet.pretrain) == ("12 epochs of COCO", 1_419_444)
    assert paper_schedule("finetune", retinanet.finetune) == ("90,000 steps of 16 images", 1_440_000)
    assert paper_schedule("pretrain-box", detr.pretrain) == ("50 epochs of COCO", 5_914_350)
    assert paper_schedule("finetune", detr.finetune) == ("50 epochs of COCO", 5_914_350)
