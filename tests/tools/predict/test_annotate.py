import numpy as np
from PIL import ImageColor
from pycocotools import mask as coco_mask

from aligndet_cli.data.dataset import Category
from aligndet_cli.plotting import COLOURS
from aligndet_cli.tools.predict.annotate import annotate

CATEGORIES = (Category(7, "cat"), Category(9, "a very long name of a class, longer than any"))


def _draw(size_hw, *entries):
    grey = np.full((*size_hw, 3), 128, dtype=np.uint8)
    return np.asarray(annotate(grey, entries, CATEGORIES))


def test_a_box_has_its_class_colour_on_its_border_and_nothing_inside():
    drawn = _draw((400, 500), {"category_id": 7, "bbox": [100, 150, 200, 120], "score": 0.5})
    assert drawn.shape == (400, 500, 3)
    colour = ImageColor.getrgb(COLOURS[0])
    for row, column in ((151, 200), (268, 200), (200, 101), (200, 298)):  # one pixel within, beside the dark rim
        assert tuple(drawn[row, column]) == colour
    assert (drawn[160:260, 110:290] == 128).all()
    assert (drawn[:130] == 128).all() and (drawn[280:] == 128).all()


def test_small_images_are_enlarged_until_labels_can_be_read():
    drawn = _draw((40, 100), {"category_id": 7, "bbox": [20, 10, 30, 20], "score": 0.5})
    assert drawn.shape == (200, 500, 3)  # 100 * 5 is the first to reach 480
    assert tuple(drawn[51, 200]) == ImageColor.getrgb(COLOURS[0])


def test_masks_tint_their_pixels_only():
    mask = np.zeros((400, 500), dtype=np.uint8, order="F")
    mask[200:220, 150:160] = 1
    entry = {"category_id": 7, "bbox": [100, 150, 200, 120], "score": 0.5, "segmentation": coco_mask.encode(mask)}
    drawn = _draw((400, 500), entry)
    tinted = np.rint(0.65 * 128 + 0.35 * np.array(ImageColor.getrgb(COLOURS[0])))
    assert (drawn[200:220, 150:160] == tinted).all()
    assert (drawn[221:260, 110:290] == 128).all()


def test_nothing_found_and_boxes_without_area_can_be_drawn():
    assert (_draw((500, 500)) == 128).all()
    _draw((1, 1), {"category_id": 9, "bbox": [0, 0, 0, 0], "score": 0.5})
    _draw((500, 30), {"category_id": 9, "bbox": [29.6, 499.5, 0.4, 0.5], "score": 0.5})
