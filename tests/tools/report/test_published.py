from pathlib import Path
from typing import Any

import pytest

from aligndet_cli.tools.report.collect import collect_report
from aligndet_cli.tools.report.published import Experiment, published_numbers
from aligndet_cli.training.recipe import MULTI_SCALE, WIDE_SIDES
from aligndet_cli.workspace import Workspace
from helpers.reports import Tuned, add_evaluated, add_imported, add_pretrained

VOC = {"images": 16_551, "steps": 12_000, "protocol": {"short_sides": list(WIDE_SIDES)}}
SWAV = {"trained_on": "swav", "protocol": {"short_sides": list(MULTI_SCALE)}}
LOW_DATA_DETR = {"detector": "detr", "fraction": 1.0, "images": 1182}


def published_of(workspace: Path, run: Tuned, *, measured: int = 5000) -> tuple[str | None, dict[str, float]]:
    add_evaluated(workspace, run, 0.1, 0.2, 0.3, images=measured)
    (row,) = collect_report(Workspace(workspace)).rows
    numbers = {name: summary.published for name, summary in row.summaries.items() if summary.published is not None}
    return row.published_in, {name: round(100 * number, 6) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("changes", "measured", "expected"),
    [
        ({}, 5000, ("table 2", {"AP": 36.3})),
        ({"fraction": 1.0, "images": 1182, "steps": 12_000}, 5000, ("table 2", {"AP": 8.0})),
        ({"fraction": 1.0, "images": 1182, "steps": 90_000}, 5000, ("table 2", {"AP": 8.3})),
        ({"fraction": 1.0, "images": 1182, "steps": 12 * 74}, 5000, (None, {})),  # 12 epochs of 1 %
        ({"detector": "mask-rcnn"}, 5000, ("table 2 and 7", {"AP": 38.3, "AP50": 58.0, "AP75": 42.1})),
        # 12 epochs of 16 images each are the paper's 90k iterations, its 1x.
        ({"detector": "detr", "steps": 50 * 7392}, 5000, (None, {})),
        ({"detector": "detr", "steps": 50 * 117_266 // 16}, 5000, ("table 2", {"AP": 35.0})),
        # As long as with all images; 50 epochs of 1182 images are another run.
        ({**LOW_DATA_DETR, "steps": 375_000}, 5000, ("table 2", {"AP": 7.6})),
        ({**LOW_DATA_DETR, "steps": 50 * 74}, 5000, (None, {})),
        (SWAV, 5000, ("table 5", {"AP": 37.1, "AP50": 56.8, "AP75": 39.5})),
        ({"backbone_weights": "/x/swav_800ep.pth"}, 5000, ("table 2", {"AP": 36.3})),  # a name says nothing
        (VOC, 4952, ("table 4", {"AP": 54.4, "AP50": 79.3, "AP75": 58.7})),
        # What is not the paper's setting has no number of the paper's.
        ({"steps": 60_000}, 5000, (None, {})),
        ({"images": 5000}, 5000, (None, {})),
        ({"backbone": "resnet34"}, 5000, (None, {})),
        ({"trained_on": "none"}, 5000, (None, {})),
        ({"trained_on": "swav"}, 5000, (None, {})),
        ({"protocol": {"policy": "detr"}}, 5000, (None, {})),
        ({"protocol": {"short_sides": [640, 800]}}, 5000, (None, {})),
        ({"protocol": {"long_side": 1024}}, 5000, (None, {})),
        ({"protocol": {"recipe": "swav"}}, 5000, (None, {})),
        ({"protocol": {"drop_steps": [60_000, 80_000]}}, 5000, (None, {})),
        ({"init": "scratch"}, 5000, (None, {})),
        ({}, 4999, (None, {})),
    ],
)
def test_plain_runs_as_in_the_paper(
    tmp_path: Path, changes: dict[str, Any], measured: int, expected: tuple[str | None, dict[str, float]]
) -> None:
    assert published_of(tmp_path, Tuned("run", **changes), measured=measured) == expected


@pytest.mark.parametrize(
    ("pretraining", "tuning", "expected"),
    [
        ({}, {}, ("table 2 and 11", {"AP": 37.3, "AP50": 56.6, "AP75": 40.1})),
        ({"steps": 2 * 87_950}, {}, ("table 13", {"AP": 37.0, "AP50": 56.2, "AP75": 39.3})),
        ({"freeze_backbone": False}, {}, ("table 11", {"AP": 35.5, "AP50": 53.7, "AP75": 37.7})),
        ({"tasks": "contrastive"}, {"detector": "faster-rcnn"}, ("table 10", {"AP": 38.7, "AP50": 58.8, "AP75": 42.1})),
        (
            {},
            {"detector": "faster-rcnn", "load_modules": ("backbone", "neck", "head")},
            ("table 9", {"AP": 38.8, "AP50": 58.8, "AP75": 42.5}),
        ),
        ({"freeze_backbone": False, "steps": 2 * 87_950}, {}, (None, {})),
        ({"topk": 15}, {}, (None, {})),
        ({"views": {"short_side": [640, 800]}}, {}, (None, {})),
        ({"training": {"batch_size": 512}, "steps": 12 * 230}, {}, (None, {})),
        ({"training": {"batch_size": 16, "lr": 0.02}}, {}, (None, {})),
    ],
)
def test_pretrained_runs_and_ablations(
    tmp_path: Path, pretraining: dict[str, Any], tuning: dict[str, Any], expected: tuple[str | None, dict[str, float]]
) -> None:
    add_pretrained(tmp_path, "pre", content_hash="pre", **pretraining)
    assert published_of(tmp_path, Tuned("run", init="file", weights="pre", **tuning)) == expected


SOCO = {"recipe": "soco", "short_sides": list(MULTI_SCALE), "drop_steps": [60_000, 80_000]}
DETR_STEPS = 150 * 117_266 // 16
DETR_DROP = {"drop_steps": [DETR_STEPS * 2 // 3]}


@pytest.mark.parametrize(
    ("layout", "epochs", "expected"),
    [
        ("soco", 400, ("table 5", {"AP": 43.0, "AP50": 63.3, "AP75": 47.1})),
        ("soco", 530, ("table 5", {"AP": 40.6, "AP50": 61.1, "AP75": 44.4})),
        ("soco", 100, (None, {})),
        ("soco", None, (None, {})),
        ("up-detr", 60, ("table 6", {"AP": 40.5, "AP50": 60.8, "AP75": 42.6})),
        ("up-detr", None, ("table 6", {"AP": 40.5, "AP50": 60.8, "AP75": 42.6})),
        ("up-detr", 30, (None, {})),
        ("detreg", 50, ("table 6", {"AP": 39.8, "AP50": 61.0, "AP75": 41.6})),
        ("detreg", 60, (None, {})),
        ("mmdet", None, (None, {})),
    ],
)
def test_what_others_have_pretrained(
    tmp_path: Path, layout: str, epochs: int | None, expected: tuple[str | None, dict[str, float]]
) -> None:
    family = "mask-rcnn" if layout == "soco" else "detr"
    detector = {"family": family, "pre_norm": layout == "up-detr"}
    add_imported(tmp_path, "start", layout=layout, epochs=epochs, detector=detector)
    tuning: dict[str, Any] = {"steps": DETR_STEPS, "trained_on": "swav"}
    tuning["protocol"] = {**DETR_DROP, "recipe": "up-detr" if layout == "up-detr" else "default"}
    if layout == "soco":
        tuning = {"trained_on": "soco", "protocol": SOCO}
    run = Tuned("run", init="file", weights="start", detector=family, **tuning)
    assert published_of(tmp_path, run) == expected


def test_the_published_detreg_is_not_the_papers(tmp_path: Path) -> None:
    detector = {"family": "detr", "pre_norm": True}
    add_imported(tmp_path, "start", layout="detreg", epochs=50, detector=detector)
    run = Tuned(
        "run", "file", weights="start", detector="detr", steps=DETR_STEPS, trained_on="swav", protocol=DETR_DROP
    )
    assert published_of(tmp_path, run) == (None, {})


@pytest.mark.parametrize(
    ("changes", "is_the_papers"),
    [
        ({}, True),
        ({"detector": {"family": "detr", "pre_norm": True}}, False),
        ({"training": {"batch_size": 64}, "steps": 50 * 117_266 // 64}, False),
        ({"steps": 60 * 117_266 // 192}, False),
        ({"method": "up-detr"}, False),
        ({"views": {"short_side": list(MULTI_SCALE)}}, False),
    ],
)
def test_a_detreg_of_our_own(tmp_path: Path, changes: dict[str, Any], is_the_papers: bool) -> None:
    sides = (320, 336, 352, 368, 400, 416, 432, 448, 464, 480)  # DETReg's
    usual = {"method": "detreg", "views": {"short_side": list(sides)}, "training": {"batch_size": 192}}
    usual |= {"detector": {"family": "detr", "pre_norm": False}, "steps": 50 * 117_266 // 192}
    add_pretrained(tmp_path, "pre", content_hash="pre", **(usual | changes))
    run = Tuned("run", "file", weights="pre", detector="detr", steps=DETR_STEPS, trained_on="swav", protocol=DETR_DROP)
    expected = ("table 6", {"AP": 39.8, "AP50": 61.0, "AP75": 41.6}) if is_the_papers else (None, {})
    assert published_of(tmp_path, run) == expected


def test_numbers_are_the_papers() -> None:
    """Gains that the paper prints beside the numbers, in tables 2 to 7."""
    numbers = published_numbers()

    def gain(metric: str, *what: Any) -> float:
        plain, ours = (numbers[Experiment(*what, variant)].numbers[metric] for variant in ("plain", "AlignDet"))
        return round(100 * (ours - plain), 6)

    assert gain("AP", "coco", "fcos", "resnet50", "supervised", "12k", 100) == 5.3
    assert gain("AP", "coco", "mask-rcnn", "resnet50", "supervised", "12k", 20) == 3.6
    assert gain("AP", "coco", "detr", "resnet50", "supervised", "100e", 10) == 1.0
    assert gain("AP", "coco", "htc", "cb-swin_l", "supervised", "1x", 100) == 0.5
    assert gain("mask_AP", "coco", "mask-rcnn", "swin_b", "simmim", "3x", 100) == 0.7
    assert gain("AP75", "voc", "faster-rcnn", "resnet50", "supervised", "12k", 100) == 6.5
    assert gain("mask_AP50", "coco", "mask-rcnn", "resnet50", "supervised", "2x", 100) == 1.0
    assert all(0 < number < 1 for one in numbers.values() for number in one.numbers.values())
