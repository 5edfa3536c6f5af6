"""Boxes must follow their pixels through every transform."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aligndet_cli.data.transforms import (
    COLOUR_OPS,
    MEAN,
    STD,
    Sample,
    ViewParams,
    apply_view,
    change_colour,
    draw_view,
    make_batch,
    mix_seed,
    pad_to_batch,
    resized_hw,
)

CPU = torch.device("cpu")


def marked_sample(box: tuple[int, int, int, int], height: int = 120, width: int = 200, position: int = 0) -> Sample:
    """A dark image whose only bright pixels are those of the box."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 255
    boxes = torch.tensor([box], dtype=torch.float32)
    return Sample(position, position, image, boxes, torch.zeros(1, dtype=torch.int64))


def bright_extent(pixels: Tensor) -> list[float]:
    """xyxy of the pixels brighter than mid grey."""
    grey = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    rows, columns = (grey.mean(dim=0) > 0.5).nonzero(as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("short_side", [60, 120, 173])
def test_the_box_stays_on_its_object(flip: bool, short_side: int) -> None:
    pixels, boxes, _ = apply_view(marked_sample((20, 30, 90, 100)), ViewParams(short_side, 999, flip), CPU)
    assert boxes[0].tolist() == pytest.approx(bright_extent(pixels), abs=1.0)


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


@pytest.mark.parametrize("op", COLOUR_OPS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.999])
def test_colour_operations_keep_shape_and_type(op: str, strength: float) -> None:
    image = torch.randint(0, 256, (3, 9, 13), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    changed = change_colour(image, op, strength)
    assert (changed.shape, changed.dtype) == (image.shape, torch.uint8)
    if op == "identity":
        assert torch.equal(changed, image)


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
