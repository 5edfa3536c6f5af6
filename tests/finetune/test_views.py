"""Crops and resolutions of fine-tuning: boxes and masks must follow their pixels."""

import pytest
import torch
from torch import Tensor, nn

from aligndet_cli.data.batch import BoxTargets, ImageBatch
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import Crop, ViewParams, crop_sample, draw_view, resized_hw
from aligndet_cli.finetune.views import (
    LabelledViews,
    Resolution,
    ResolutionConfig,
    _detr_crop,
    _jitter,
    draw_labelled_view,
    resolve_resolution,
)
from aligndet_cli.training.recipe import MULTI_SCALE, SINGLE_SCALE, WIDE_SIDES

CPU = torch.device("cpu")
BOX = (30, 20, 90, 60)


def bright_box(height: int, width: int, position: int = 0, box: tuple[int, int, int, int] = BOX) -> Sample:
    """A black image with one white box, and its mask."""
    x1, y1, x2, y2 = box
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, y1:y2, x1:x2] = True
    image = mask.to(torch.uint8).expand(3, -1, -1) * 255
    return Sample(position, 0, image.contiguous(), torch.tensor([box]).float(), torch.tensor([5]), mask)


def test_crop_by_hand() -> None:
    """Crop of rows 2..7 and columns 4..10: boxes move by (-4, -2) and end at 6 x 5."""
    boxes = torch.tensor([[2.0, 3, 12, 9], [5, 3, 7, 4], [0, 0, 4, 9], [5, 7, 9, 9]])
    image = torch.arange(3 * 10 * 20, dtype=torch.int32).view(3, 10, 20).to(torch.uint8)
    masks = torch.zeros(4, 10, 20, dtype=torch.bool)
    masks[:, 2, 4] = True
    sample = Sample(0, 0, image, boxes, torch.tensor([1, 2, 3, 4]), masks)
    cropped = crop_sample(sample, Crop(2, 4, 5, 6), CPU)
    # The last two touch the crop's left and lower border from outside.
    assert cropped.boxes.tolist() == [[0, 1, 6, 5], [1, 1, 3, 2]]
    assert cropped.class_ids.tolist() == [1, 2]
    assert torch.equal(cropped.image, image[:, 2:7, 4:10])
    assert cropped.masks is not None and cropped.masks.shape == (2, 5, 6) and cropped.masks[:, 0, 0].all()
    whole = crop_sample(sample, Crop(0, 0, 10, 20), CPU)
    assert torch.equal(whole.boxes, boxes) and torch.equal(whole.image, image)
    assert whole.masks is not None and torch.equal(whole.masks, masks)


def test_crop_of_detr_by_hand() -> None:
    # Short side 400 of 400 x 800, so nothing is scaled: height from 384 to 400, width from 384 to 600, half way;
    # then 4 of the 8 rows left and 154 of the 308 columns left (9 and 309 places).
    assert _detr_crop((400, 800), (0.0, 0.5, 0.5, 0.5, 0.5)) == Crop(4, 154, 392, 492)
    # Short side 600, so one pixel is 1.5: both from 256 to 400, drawn at the lower end, at the top left.
    assert _detr_crop((400, 800), (0.99, 0.0, 0.0, 0.0, 0.0)) == Crop(0, 0, 256, 256)
    # A portrait at short side 500: scale 5; height from 76.8 to 120, width from 76.8 to 100, at the upper end.
    assert _detr_crop((200, 100), (0.5, 1.0, 1.0, 0.0, 0.0)) == Crop(0, 0, 120, 100)


def test_large_scale_jitter_by_hand() -> None:
    draw = (1.25 - 0.1) / 1.9
    # Long side 1.25 x 64 = 80 of 100 x 50 pixels: 64 / 0.8 = 80 columns are left, at 10 of 20.
    crop, view = _jitter((0, 0), (50, 100), 64, (draw, 0.5, 0.5))
    assert crop == Crop(0, 10, 50, 80)
    assert resized_hw(crop[2:], view.short_side, view.long_side) == (40, 64)
    # Long side 0.5 x 64: nothing is cut.
    crop, view = _jitter((0, 0), (50, 100), 64, ((0.5 - 0.1) / 1.9, 0.5, 0.5))
    assert crop is None and resized_hw((50, 100), view.short_side, view.long_side) == (16, 32)
    # The largest, of a square: half of either side.
    crop, view = _jitter((0, 0), (100, 100), 64, (1.0, 0.0, 0.99999))
    assert crop == Crop(0, 50, 50, 50) and resized_hw((50, 50), view.short_side, view.long_side) == (64, 64)


def test_plain_resizing_is_what_it_was() -> None:
    resolution = Resolution("resize", (64, 96), 128, 1024)
    for position in range(50):
        expected = draw_view((3, position, 0), (64, 96), 128, with_colour=False)
        assert draw_labelled_view((3, position), (50, 70), resolution) == (None, expected)


def test_draws_of_detr() -> None:
    """Half of the images are cropped, at every place; the final resolution does not depend on that."""
    resolution = Resolution("detr", (64, 96), 128, 1024)
    drawn = [draw_labelled_view((0, position), (100, 160), resolution) for position in range(400)]
    crops = [crop for crop, _ in drawn if crop is not None]
    assert 160 < len(crops) < 240
    for top, left, height, width in crops:
        # limits / short side x 100: from 64 (384 at 600) to 100 (all of it), and to 150 (600 at 400)
        assert 64 <= height <= 100 and 64 <= width <= 150 and top + height <= 100 and left + width <= 160
    assert {view.short_side for _, view in drawn} == {64, 96} and len({crop.left for crop in crops}) > 20
    assert drawn[:9] == [draw_labelled_view((0, position), (100, 160), resolution) for position in range(9)]


class Recorder(nn.Module):
    """Stands for a detector: keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[ImageBatch, list[BoxTargets]]] = []

    def forward(self, images: ImageBatch, targets: list[BoxTargets]) -> dict[str, Tensor]:
        self.seen.append((images, targets))
        return {"loss": self.weight.sum()}


@pytest.mark.parametrize("policy", ["resize", "detr", "lsj"])
def test_boxes_and_masks_follow_their_pixels(policy: str) -> None:
    model = Recorder()
    views = LabelledViews(model, resolution=Resolution(policy, (64, 96), 192, 96), seed=0)
    for position in range(0, 40, 2):
        views([bright_box(80, 120, position), bright_box(110, 100, position + 1)], 0)
    num_boxes = 0
    for images, targets in model.seen:
        if policy == "lsj":
            assert images.pixels.shape[-2:] == (96, 96)
        for pixels, (height, width), target in zip(images.pixels, images.sizes_hw, targets, strict=True):
            assert target.masks is not None and target.masks.shape == (len(target.boxes), *images.pixels.shape[-2:])
            assert len(target.class_ids) == len(target.boxes)
            is_bright = pixels[0, :height, :width] > 0
            num_boxes += len(target.boxes)
            for box, mask in zip(target.boxes, target.masks, strict=True):
                assert (box >= 0).all() and box[2] <= width and box[3] <= height
                if ((box[2:] - box[:2]) < 4).any():
                    continue  # too thin a rest to be seen
                for found in (is_bright, mask):
                    rows, columns = found.nonzero(as_tuple=True)
                    around = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                    assert (around - box).abs().max() <= 1.5
            if not len(target.boxes):
                assert is_bright.float().mean() < 0.01
    assert num_boxes > 30


def test_what_decides_the_resolution() -> None:
    def resolved(of_recipe: str, scales: tuple[int, ...] = MULTI_SCALE, **asked: object) -> Resolution:
        return resolve_resolution(ResolutionConfig.model_validate(asked), of_recipe, scales)

    assert resolved("resize") == Resolution("resize", MULTI_SCALE, 1333, 1024)
    assert resolved("detr", SINGLE_SCALE).short_sides == WIDE_SIDES
    assert resolved("lsj").at_test == (800, 1333) and resolved("lsj").worst_sizes() == [(1024, 1024)]
    assert resolved("detr", policy="resize", short_side=(64,)) == Resolution("resize", (64,), 1333, 1024)
    assert resolved("detr", policy="auto").policy == "detr"
    assert resolved("resize", policy="lsj", jitter_side=64).padded_side == 64
    assert isinstance(draw_labelled_view((0, 0), (9, 9), resolved("lsj"))[1], ViewParams)
