from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligndet_cli.data.coco import to_coco_dict
from aligndet_cli.data.dataset import Category, ImageSet
from aligndet_cli.drawing import draw_tile
from aligndet_cli.evaluate import sheets
from aligndet_cli.evaluate.analysis import TOUCH_IOU, analyse
from aligndet_cli.evaluate.plots import (
    draw_comparison,
    draw_confusion,
    draw_errors,
    draw_per_class,
    draw_plots,
    draw_precision_recall,
)
from aligndet_cli.evaluate.sheets import MAX_BOXES_NAMED, NUM_IMAGES, Drawing, draw_best_and_worst, draw_detections
from aligndet_cli.metrics.coco import evaluate_coco
from helpers.texts import clashing_texts

pytestmark = pytest.mark.plots

PICTURES = [
    "best_and_worst.png",
    "confusion.png",
    "detections.png",
    "errors.png",
    "per_class_ap.png",
    "precision_recall.png",
]


def _image_set(folder: Path, num_images: int, names: list[str]) -> ImageSet:
    """Grey images of 80 x 50 pixels, each with one box; classes take turns."""
    for number in range(num_images):
        Image.fromarray(np.full((50, 80, 3), 90, dtype=np.uint8)).save(folder / f"{number}.png")
    return ImageSet(
        format="voc",
        root=folder,
        split="val",
        images_dir=folder,
        file_names=[f"{number}.png" for number in range(num_images)],
        image_ids=np.arange(num_images),
        sizes_hw=np.tile(np.array([[50, 80]], dtype=np.int32), (num_images, 1)),
        offsets=np.arange(num_images + 1),
        boxes=np.tile(np.array([[5, 0, 40, 30]], dtype=np.float32), (num_images, 1)),
        class_ids=np.arange(num_images) % len(names),
        areas=np.full(num_images, 1050, dtype=np.float32),
        is_crowd=np.zeros(num_images, dtype=np.bool_),
        segmentations=None,
        categories=tuple(Category(number + 1, name) for number, name in enumerate(names)),
        fingerprint="",
        problems={},
    )


def _drawing(folder, num_images, names, predictions) -> Drawing:
    image_set = _image_set(folder, num_images, names)
    truth = to_coco_dict(image_set)
    evaluation = evaluate_coco(truth, predictions, loose_iou=TOUCH_IOU)
    analysis = analyse(evaluation, truth, predictions)
    return Drawing(evaluation, analysis, truth, predictions, image_set, "run on val")


def _tiles(draw, drawing: Drawing, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str], list[str]]]:
    """Number of boxes, labels and lines of text of each tile of a sheet."""
    tiles = []

    def noting(pixels, boxes, size_hw, *, labels, lines, **rest):
        tiles.append((len(boxes), labels, lines))
        return draw_tile(pixels, boxes, size_hw, labels=labels, lines=lines, **rest)

    monkeypatch.setattr(sheets, "draw_tile", noting)
    draw(drawing)
    return tiles


@pytest.mark.parametrize(
    ("num_images", "names", "num_found"),
    [
        (9, ["cat", "dog"], 7),
        (1, ["cat"], 0),
        (45, [f"class {number:02d}" for number in range(45)], 20),
        (2, ["猫"], 1),
    ],
    ids=["usual", "nothing found", "more classes than bars", "letters the font lacks"],
)
def test_pictures_are_drawn_and_the_same_every_time(tmp_path, caplog, num_images, names, num_found):
    found = [
        {"image_id": n, "category_id": n % len(names) + 1, "bbox": [6, 1, 34, 29], "score": 0.25 + n / 100}
        for n in range(num_found)
    ]
    drawing = _drawing(tmp_path, num_images, names, found)
    draw_plots(tmp_path / "once", drawing)
    assert sorted(file.name for file in (tmp_path / "once").iterdir()) == PICTURES
    for name in PICTURES:
        assert np.asarray(Image.open(tmp_path / "once" / name)).std() > 5  # not an empty page
    if num_images == 9:
        draw_plots(tmp_path / "again", drawing)
        for name in PICTURES:
            assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert "was not drawn" not in caplog.text


def test_sheet_shows_detections_from_the_score_of_the_best_f1_on(tmp_path, monkeypatch):
    # Both right ones are kept, and with them what is between; 1 of 20 more is not worth the last.
    boxes = ([6, 1, 34, 29], 0.9), ([60, 40, 5, 5], 0.5), ([60, 40, 5, 5], 0.2)
    found = [{"image_id": 0, "category_id": 1, "bbox": box, "score": score} for box, score in boxes]
    found.append({"image_id": 19, "category_id": 1, "bbox": [6, 1, 34, 29], "score": 0.4})
    drawing = _drawing(tmp_path, 20, ["cat"], found)
    tiles = _tiles(draw_detections, drawing, monkeypatch)
    assert [count for count, *_ in tiles] == [1, 2] + [1, 0] * (NUM_IMAGES - 2) + [1, 1]
    assert tiles[1][1] == ["cat 0.50", "cat 0.90"]  # the best on top
    assert tiles[0][2] == ["0.png", "ground truth: 1"]
    assert tiles[-2][2] == ["19.png", "ground truth: 1"]  # spread from the first to the last
    assert [lines for _, _, lines in _tiles(draw_best_and_worst, drawing, monkeypatch)[1:4:2]] == [
        ["best: 1 right, 0 wrong, 0 missed", "detections: 1"],
        ["best: 1 right, 1 wrong, 0 missed", "detections: 2"],
    ]


def test_sheet_names_crowds_and_the_best_detections(tmp_path, monkeypatch):
    found = [{"image_id": 0, "category_id": 1, "bbox": [6, 1, 34, 29], "score": 0.9 - n / 100} for n in range(40)]
    drawing = _drawing(tmp_path, 1, ["cat"], found)
    drawing.ground_truth["annotations"][0]["iscrowd"] = 1
    drawing.analysis["confusion"]["score_threshold"] = 0.3
    (_, truths, _), (count, labels, _) = _tiles(draw_detections, drawing, monkeypatch)
    assert truths == ["cat (crowd)"]
    assert (count, labels.count("")) == (40, 40 - MAX_BOXES_NAMED) and labels[-1] == "cat 0.90"


def test_confusion_matrix_has_the_counts_in_their_places(tmp_path):
    # The boxes of images 0 (cat) and 1 (dog) found as cats, that of image 2 (cat) missed, and a dog on nothing.
    found = [(0, 1, [5, 0, 35, 30]), (1, 1, [5, 0, 35, 30]), (0, 2, [60, 35, 10, 10])]
    entries = [{"image_id": i, "category_id": c, "bbox": box, "score": 0.9} for i, c, box in found]
    axes = draw_confusion(_drawing(tmp_path, 3, ["cat", "dog"], entries)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "missed"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "background"]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "1",  # (column, row)
        (2, 0): "1",
        (0, 1): "1",
        (1, 2): "1",
    }


def test_error_bars_have_length_one(tmp_path):
    found = [{"image_id": 0, "category_id": 1, "bbox": [6, 1, 34, 29], "score": 0.9}]
    drawing = _drawing(tmp_path, 3, ["cat", "dog"], found)
    axes = draw_errors(drawing).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all classes", "cat", "dog"]
    assert [sum(bar.get_width() for bar in axes.patches[row::3]) for row in range(3)] == pytest.approx([1, 1, 1])
    both = draw_comparison({"one": drawing.analysis, "other": drawing.analysis}, "one against other").axes
    assert len(both[0].get_lines()) == 4 and len(both[1].patches) == 10


def test_classes_without_ground_truth_have_no_bar(tmp_path):
    axes = draw_per_class(_drawing(tmp_path, 1, ["cat", "dog"], [])).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat (1)"]


def test_every_class_has_a_label_of_its_own_in_every_picture(tmp_path, monkeypatch):
    names = ["cat", "cat", "_background_", "background", "all classes", "$x$"]
    own = ["cat (id 1)", "cat (id 2)", *names[2:]]
    drawing = _drawing(tmp_path, 6, names, [])
    curves = draw_precision_recall(drawing).axes[1].get_legend().get_texts()
    assert [text.get_text() for text in curves] == [f"{name}: AP50 0.0" for name in own]
    bars = [label.get_text() for label in draw_per_class(drawing).axes[0].get_yticklabels()]
    assert sorted(bars) == sorted(f"{name} (1)" for name in own)
    rows = [label.get_text() for label in draw_errors(drawing).axes[0].get_yticklabels()]
    assert rows[0] == "all classes" and len(set(rows)) == 7 and "all classes (id 5)" in rows
    cells = [label.get_text() for label in draw_confusion(drawing).axes[0].get_yticklabels()]
    assert cells == [*own[:3], "background (id 4)", *own[4:], "background"]
    tiles = _tiles(draw_detections, drawing, monkeypatch)
    assert [labels[0] for _, labels, _ in tiles[::2]] == [*own[:2], "_background_", *own[3:]]


def test_a_class_has_one_colour_in_curves_and_pictures(tmp_path, monkeypatch):
    drawing = _drawing(tmp_path, 4, ["cat", "dog"], [])
    drawing.evaluation.metrics["per_class"][1]["ground_truths"] = 9  # the curve of the most frequent class comes first
    curves = draw_precision_recall(drawing).axes[1]
    names = [text.get_text().partition(":")[0] for text in curves.get_legend().get_texts()]
    in_curves = dict(zip(names, (line.get_color() for line in curves.lines), strict=True))
    in_pictures = {}

    def noting(pixels, boxes, size_hw, *, colours, labels, lines):
        in_pictures.update(zip(labels, colours, strict=True))
        return draw_tile(pixels, boxes, size_hw, colours=colours, labels=labels, lines=lines)

    monkeypatch.setattr(sheets, "draw_tile", noting)
    draw_detections(drawing)
    assert names == ["dog", "cat"] and in_curves == in_pictures


LONG = "retinanet-resnet50-three-times-as-long-with-contrast-only-f1-p10-s0"


@pytest.mark.parametrize("num_classes", [3, 14])
def test_no_text_covers_another(tmp_path, num_classes):
    names = [f"a class of many words, number {number}" for number in range(num_classes)]
    found = [{"image_id": n, "category_id": n + 1, "bbox": [6, 1, 34, 29], "score": 0.5} for n in range(num_classes)]
    drawing = replace(_drawing(tmp_path, num_classes, names, found), title=f"{LONG} on val")
    for draw in (draw_precision_recall, draw_per_class, draw_errors, draw_confusion):
        assert clashing_texts(draw(drawing)) == [], draw.__name__
    analyses = {LONG: drawing.analysis, LONG.replace("s0", "s1"): drawing.analysis}
    assert clashing_texts(draw_comparison(analyses, " against ".join(analyses))) == []
