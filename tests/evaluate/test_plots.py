from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligndet_cli.data.dataset import Category, ImageSet
from aligndet_cli.detectors.metrics import coco_ground_truth, evaluate_coco
from aligndet_cli.evaluate.plots import NUM_SHEET_IMAGES, Drawing, draw_detections, draw_per_class, draw_plots

PICTURES = ["detections.png", "per_class_ap.png", "precision_recall.png"]


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
    truth = coco_ground_truth(image_set)
    return Drawing(evaluate_coco(truth, predictions), truth, predictions, image_set, "run on val")


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
    for folder in ("once", "again"):
        draw_plots(tmp_path / folder, drawing)
    assert sorted(file.name for file in (tmp_path / "once").iterdir()) == PICTURES
    for name in PICTURES:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert np.asarray(Image.open(tmp_path / "once" / name)).std() > 5  # not an empty page
    assert caplog.text == ""


def test_sheet_shows_detections_from_a_score_of_three_tenths(tmp_path):
    found = [{"image_id": 0, "category_id": 1, "bbox": [6, 1, 34, 29], "score": score} for score in (0.29, 0.3, 0.9)]
    axes = draw_detections(_drawing(tmp_path, 20, ["cat"], found)).axes
    assert len(axes) == 2 * NUM_SHEET_IMAGES
    assert [len(axis.patches) for axis in axes[:4]] == [1, 2, 1, 0]
    assert axes[-2].get_title().startswith("19.png")  # spread from the first to the last


def test_classes_without_ground_truth_have_no_bar(tmp_path):
    axes = draw_per_class(_drawing(tmp_path, 1, ["cat", "dog"], [])).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat (1)"]
