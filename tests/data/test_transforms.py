"""Boxes must follow their pixels through every transform."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from aligndet_cli.data.sample import Sample, mix_seed
from aligndet_cli.data.toy import draw_toy_image
from aligndet_cli.data.transforms import (
    COLOUR_OPS,
    MEAN,
    STD,
    ColourOp,
    ViewParams,
    apply_view,
    change_colour,
    draw_view,
    make_batch,
    pad_to_batch,
    resized_hw,
)

CPU = torch.device("cpu")


def marked_sample(box: tuple[int, int, int, int], height: int = 120, width: int = 200, position: int = 0) -> Sample:
    """Return a dark image that is bright inside the box only."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 255
    boxes = torch.tensor([box], dtype=torch.float32)
    return Sample(position, position, image, boxes, torch.zeros(1, dtype=torch.int64))


def bright_extent(pixels: Tensor) -> list[float]:
    """Return the box xyxy of the pixels brighter than mid grey."""
    grey = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    rows, columns = (grey.mean(dim=0) > 0.5).nonzero(as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("short_side", [60, 120, 173])
def test_the_box_stays_on_its_object(flip: bool, short_side: int) -> None:
    pixels, targets = apply_view(marked_sample((20, 30, 90, 100)), ViewParams(short_side, 999, flip), CPU)
    assert targets.boxes[0].tolist() == pytest.approx(bright_extent(pixels), abs=1.0)


def test_flipping_is_exact_and_before_padding() -> None:
    # Width 50 is padded to 64; flipped about the image, not the padding: x 20..60 of 50 wide would be negative.
    sample = marked_sample((10, 5, 30, 25), height=40, width=50)
    images, targets = make_batch([sample], [ViewParams(40, 999, flip=True)], CPU)
    assert targets[0].boxes[0].tolist() == [20.0, 5.0, 40.0, 25.0]
    assert bright_extent(images.pixels[0, :, :40, :50]) == [20, 5, 40, 25]
    assert images.pixels.shape == (1, 3, 64, 64) and images.sizes_hw == ((40, 50),)
    assert images.pixels[0, :, :, 50:].abs().sum() == 0


@pytest.mark.parametrize(
    ("size_hw", "sides", "expected"),
    [
        ((480, 640), (800, 1333), (800, 1067)),  # 640 * 800 / 480 = 1066.67, rounded half up
        ((427, 640), (800, 1333), (800, 1199)),  # 640 * 800 / 427 = 1199.06
        ((300, 1000), (800, 1333), (400, 1333)),  # the long side limits: 300 * 1.333 = 399.9
        ((1, 1), (800, 1333), (800, 800)),
        ((2, 20000), (800, 1333), (1, 1333)),  # 0.13 of a pixel is kept as one
    ],
)
def test_sizes_are_those_of_mmdetection(
    size_hw: tuple[int, int], sides: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert resized_hw(size_hw, *sides) == expected


def test_views_depend_on_their_seed_alone() -> None:
    draws = [draw_view((0, position, 1), (640, 800), 1333, with_colour=True) for position in range(400)]
    assert draws == [draw_view((0, position, 1), (640, 800), 1333, with_colour=True) for position in range(400)]
    assert {draw.short_side for draw in draws} == {640, 800}
    assert {draw.colour for draw in draws} == set(COLOUR_OPS)
    assert 150 < sum(draw.flip for draw in draws) < 250
    assert draws != [draw_view((0, position, 2), (640, 800), 1333, with_colour=True) for position in range(400)]


def test_without_colour_pixels_are_left_alone() -> None:
    assert {draw_view((1, p), (640,), 1333, with_colour=False).colour for p in range(30)} == {"identity"}


def picture(number: int, height: int = 60, width: int = 80) -> Tensor:
    """Return (3, H, W) uint8: noise over all levels, noise in a narrow range, one flat colour, or a drawn picture."""
    rng = np.random.default_rng(number)
    if number == 0:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    elif number == 1:
        pixels = rng.integers(100, 130, (height, width, 3), dtype=np.uint8)
    elif number == 2:
        pixels = np.full((height, width, 3), (7, 77, 177), dtype=np.uint8)
    else:
        pixels = draw_toy_image(rng, (height, width), max_objects=3)[0]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


# The operations that the authors' `rand_aug.py` calls; its levels are integers of 10.
PILLOW: dict[ColourOp, Callable[[Image.Image, int], Image.Image]] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "solarize": lambda image, level: ImageOps.solarize(image, min(int(level * 256 / 10), 255)),
    "color": lambda image, level: ImageEnhance.Color(image).enhance(level * 1.8 / 10 + 0.1),
    "contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(level * 1.8 / 10 + 0.1),
    "brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(level * 1.8 / 10 + 0.1),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(level * 1.8 / 10 + 0.1),
    "posterize": lambda image, level: ImageOps.posterize(image, 4 - int(level * 4 / 10)),
}
# Pillow rounds greys and torchvision cuts them off, also in the results of autocontrast and of the blends.
IS_ROUNDED: set[ColourOp] = {"autocontrast", "color", "contrast", "sharpness"}


@pytest.mark.parametrize("op", COLOUR_OPS)
@pytest.mark.parametrize("magnitude", range(1, 10))
def test_colour_operations_are_pillows_within_a_level(op: ColourOp, magnitude: int) -> None:
    for number in range(6):
        image = picture(number)
        expected = PILLOW[op](Image.fromarray(image.permute(1, 2, 0).numpy()), magnitude)
        changed = change_colour(image, op, magnitude)
        assert (changed.shape, changed.dtype) == (image.shape, torch.uint8)
        difference = changed.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
        assert abs(difference).max() <= (op in IS_ROUNDED)


def drawn_views(count: int) -> list[ViewParams]:
    return [draw_view((0, position, 1), (640, 800), 1333, with_colour=True) for position in range(count)]


def test_of_20_000_views_none_is_black() -> None:
    pictures = [picture(number, 40, 50) for number in range(3, 27)]
    for position, view in enumerate(drawn_views(20_000)):
        changed = change_colour(pictures[position % len(pictures)], view.colour, view.magnitude)
        assert changed.max() >= 32, view


def test_operations_and_magnitudes_are_drawn_evenly() -> None:
    views = drawn_views(20_000)
    operations = Counter(view.colour for view in views)
    magnitudes = Counter(view.magnitude for view in views)
    both = Counter((view.colour, view.magnitude) for view in views)
    assert set(operations) == set(COLOUR_OPS) and set(magnitudes) == set(range(1, 10)) and len(both) == 81
    # Chi-square with 8 and 80 degrees of freedom: above these limits in one of a thousand seeds.
    for counts, limit in ((operations, 26.1), (magnitudes, 26.1), (both, 124.8)):
        expected = len(views) / len(counts)
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < limit


def test_instance_ids_run_over_the_batch_and_survive_images_without_boxes() -> None:
    empty = Sample(
        1, 1, torch.zeros(3, 40, 40, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    )
    samples = [marked_sample((1, 1, 20, 20)), empty, marked_sample((5, 5, 30, 30))]
    _, targets = make_batch(samples, [ViewParams(64, 128)] * 3, CPU, instance_offset=300)
    assert [target.instance_ids.tolist() for target in targets] == [[300], [], [301]]


def test_batches_are_multiples_of_32_of_the_largest() -> None:
    batch = pad_to_batch([torch.ones(3, 33, 20), torch.ones(3, 10, 65)])
    assert batch.pixels.shape == (2, 3, 64, 96)
    assert batch.sizes_hw == ((33, 20), (10, 65))


def test_seeds_mix_without_collisions() -> None:
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(50) for c in range(5)}
    assert len(seeds) == 5000


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("short_side", [60, 120, 173])
def test_masks_stay_on_their_object_and_are_padded_like_the_image(flip: bool, short_side: int) -> None:
    sample = marked_sample((20, 30, 90, 100))
    sample = replace(sample, masks=sample.image[:1] > 0)
    params = ViewParams(short_side, 999, flip)
    images, targets = make_batch([sample, marked_sample((1, 1, 9, 9), 190, 130)], [params] * 2, CPU)
    assert targets[1].masks is None
    masks = targets[0].masks
    assert masks.dtype == torch.bool and masks.shape == (1, *images.pixels.shape[-2:])
    rows, columns = masks[0].nonzero(as_tuple=True)
    extent = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
    assert extent == pytest.approx(targets[0].boxes[0].tolist(), abs=1.0)


def test_no_boxes_have_no_masks() -> None:
    empty = Sample(
        0, 0, torch.zeros(3, 40, 50, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    )
    sample = replace(empty, masks=torch.zeros(0, 40, 50, dtype=torch.bool))
    _, targets = make_batch([sample], [ViewParams(64, 99)], CPU)
    assert targets[0].masks.shape == (0, 64, 96)
