import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from aligndet_cli.config import DataConfig
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.data.loaders import LabelBoxes, SampleStream
from aligndet_cli.data.masks import LabelMasks, draw_mask, encode_mask
from aligndet_cli.data.open import open_images
from aligndet_cli.data.segmentations import Segmentations
from aligndet_cli.data.toy import draw_toy_data
from aligndet_cli.errors import DataError

# x 2..6 and y 1..4 of an image 5 high and 8 wide
SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]
PIXELS = np.zeros((5, 8), dtype=np.bool_)
PIXELS[1:4, 2:6] = True


def test_polygons_are_drawn() -> None:
    np.testing.assert_array_equal(draw_mask(SQUARE, (5, 8)), PIXELS)
    two = draw_mask([[0, 0, 2, 0, 2, 2, 0, 2], *SQUARE], (5, 8))
    assert two.sum() == PIXELS.sum() + 4


def test_run_length_codes_are_drawn() -> None:
    code = coco_mask.encode(np.asfortranarray(PIXELS.astype(np.uint8)))
    np.testing.assert_array_equal(draw_mask({**code, "counts": code["counts"].decode()}, (5, 8)), PIXELS)
    columns = PIXELS.T.ravel()  # an uncompressed code counts runs of 0 and 1 in turn, down the columns
    ends = np.flatnonzero(np.diff(columns)) + 1
    counts = np.diff([0, *ends, len(columns)]).tolist()
    np.testing.assert_array_equal(draw_mask({"size": [5, 8], "counts": counts}, (5, 8)), PIXELS)


def test_polygons_of_less_than_three_corners_are_nothing() -> None:
    # Four numbers would be a box to pycocotools.
    with pytest.raises(DataError, match="no polygon of three corners"):
        draw_mask([[1, 1, 3, 3]], (5, 8))
    assert Segmentations.of([[[1, 1, 3, 3]], [[1, 1, 3, 3], *SQUARE]])[1] == SQUARE


@pytest.mark.parametrize("bad", [{"size": [8, 5], "counts": [40]}, {"counts": [40]}, [["a"] * 6], "text"])
def test_what_cannot_be_drawn_is_an_error(bad: object) -> None:
    with pytest.raises(DataError):
        draw_mask(bad, (5, 8))


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Three toy images; box 0 has no polygon, box 1 is a crowd."""
    draw_toy_data(tmp_path, seed=0, num_train=3, num_val=1, size_hw=(64, 80))
    file = tmp_path / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = []
    content["annotations"][1]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    return open_images(DataConfig(root=tmp_path), purpose="train", with_masks=True)


def test_masks_are_row_for_row_those_of_the_boxes(images: ImageSet) -> None:
    masks = LabelMasks(images)
    for index in range(len(images)):
        boxes, _ = LabelBoxes(images).boxes_and_classes(index)
        drawn = masks.masks_of(index, tuple(images.sizes_hw[index]))
        assert drawn.shape == (len(boxes), *images.sizes_hw[index])
        for row, (mask, box) in enumerate(zip(drawn, boxes, strict=True)):
            if (index, row) == (0, 0):
                assert not mask.any()
                continue
            y, x = np.nonzero(mask)
            # a polygon runs through the centres of the outermost pixels, so some of a pointed end is missing
            np.testing.assert_allclose([x.min(), y.min(), x.max() + 1, y.max() + 1], box, atol=2)
    assert masks.count([0, 1, 2]) == (len(images.boxes) - 2, len(images.boxes) - 1)
    assert masks.count([]) == (0, 0)


def test_they_are_small_and_can_be_sent_to_other_processes(images: ImageSet) -> None:
    masks = LabelMasks(images)
    again = pickle.loads(pickle.dumps(masks))
    assert np.array_equal(again.masks_of(1, (64, 80)), masks.masks_of(1, (64, 80)))
    assert LabelMasks(ImageSet(**{**images.__dict__, "segmentations": None})).count([0]) == (
        0,
        int((~images.record(0).is_crowd).sum()),
    )


def test_samples_carry_masks(images: ImageSet) -> None:
    stream = SampleStream(images, range(3), LabelBoxes(images), "fail", LabelMasks(images))
    sample = stream[(0, 2)]
    assert sample.masks.dtype == torch.bool
    assert sample.masks.shape == (len(sample.boxes), *sample.image.shape[1:]) and sample.masks.any(dim=(1, 2)).all()


def test_a_bad_mask_names_its_image(images: ImageSet) -> None:
    bad = [{"size": [1, 1], "counts": [1]}] * len(images.boxes)
    masks = LabelMasks(ImageSet(**{**images.__dict__, "segmentations": bad}))
    with pytest.raises(DataError) as caught:
        SampleStream(images, range(3), LabelBoxes(images), "fail", masks)[(0, 0)]
    error = caught.value
    assert images.file_names[0] in str(error) and "repair" in str(error) and "\n" not in str(error)


def codes() -> list[dict]:
    """Run-length codes as pycocotools writes them, of empty, full and random masks of 5 x 8."""
    generator = np.random.default_rng(0)
    masks = [np.zeros((5, 8)), np.ones((5, 8)), *(generator.random((5, 8)) < 0.5 for _ in range(20))]
    return [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]


@pytest.mark.parametrize("as_text", [False, True])
def test_compressed_codes_stay_as_they_are(as_text: bool) -> None:
    for code in codes():
        given = {**code, "counts": code["counts"].decode() if as_text else code["counts"]}
        assert encode_mask(given, (5, 8)) == given
    large = coco_mask.encode(np.asfortranarray(np.random.default_rng(1).integers(0, 2, (300, 400)).astype(np.uint8)))
    assert encode_mask(large, (300, 400)) == large


def test_a_flat_list_is_one_polygon() -> None:
    np.testing.assert_array_equal(draw_mask(SQUARE[0], (5, 8)), PIXELS)


FAR = [float("nan"), float("inf"), -float("inf"), 1e9, -1e9, 1e300, 81, -81]
LENGTHS = [[], [39], [41], [10**12], [-1, 41], [20, 21], [45, -5]]


@pytest.mark.parametrize(
    "bad",
    [
        *([[2, 1, 6, 1, value, 4]] for value in FAR),
        *([[2, value, 6, 1, 6, 4], *SQUARE] for value in FAR),
        *({"size": [5, 8], "counts": counts} for counts in LENGTHS),
        *({"size": [5, 8], "counts": counts} for counts in ("", "0", "zzzz", "`", "é", b"\xff\xff", 7, None, [None])),
        {"size": 5, "counts": [40]},
        {"size": ["5", 8], "counts": [40]},
        {"size": [5, 8]},
        "text",
        7,
        True,
        [{}],
        [["1", "2", "3", "4", "5", "x"]],
        [[{}]],
    ],
)
def test_nothing_unchecked_reaches_pycocotools(bad: object) -> None:
    with pytest.raises(DataError, match="^a (mask|run-length code) "):
        encode_mask(bad, (5, 8))
