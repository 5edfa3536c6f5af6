import dataclasses

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from aligndet_cli.data.crops import CropParams, blur, change_colours, draw_crop, make_views
from aligndet_cli.data.sample import Sample
from aligndet_cli.data.transforms import MEAN, STD
from aligndet_cli.pretrain_image.recipes import RECIPES

RECIPE = RECIPES["simsiam"].views[0]
DEVICE = torch.device("cpu")


@pytest.fixture
def images() -> torch.Tensor:
    """(3, 3, 17, 23) in 0.3..0.6: no change below reaches black or white."""
    return 0.3 + 0.3 * torch.rand(3, 3, 17, 23, generator=torch.Generator().manual_seed(0))


def sample(height: int, width: int, position: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(position)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return Sample(position, position, image, torch.empty(0, 4), torch.empty(0, dtype=torch.int64))


def test_colours_are_torchvisions_each_with_its_own_factor(images: torch.Tensor) -> None:
    unchanged = (1.0, 1.0, 1.0, 0.0)
    changes = {
        0: (F.adjust_brightness, [1.3, 1.0, 0.7]),
        1: (F.adjust_contrast, [0.6, 1.4, 1.0]),
        2: (F.adjust_saturation, [0.0, 1.4, 0.7]),
    }
    for place, (change, amounts) in changes.items():
        factors = [(*unchanged[:place], amount, *unchanged[place + 1 :]) for amount in amounts]
        expected = torch.stack([change(image, amount) for image, amount in zip(images, amounts, strict=True)])
        torch.testing.assert_close(change_colours(images, factors), expected, rtol=0, atol=2e-4)
    assert torch.allclose(change_colours(images, [unchanged] * 3), images, atol=1e-6)


def test_hue_turns_colours_and_keeps_grays_and_brightness(images: torch.Tensor) -> None:
    gray = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    turned = [(1.0, 1.0, 1.0, 0.1)] * 3
    torch.testing.assert_close(change_colours(gray, turned), gray, rtol=0, atol=1e-3)
    changed = change_colours(images, turned)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close((changed * luma).sum(1), (images * luma).sum(1), rtol=0, atol=1e-3)
    assert (changed - images).abs().mean() > 0.01
    # Red towards yellow, as torchvision turns it.
    red = torch.tensor([0.5, 0.2, 0.2])[None, :, None, None]
    ours, theirs = change_colours(red, turned[:1]).flatten(), F.adjust_hue(red, 0.1).flatten()
    assert ours.argsort().tolist()[-1] == 0 and ours[1] > ours[2] and theirs[1] > theirs[2]


def test_blur_is_torchvisions(images: torch.Tensor) -> None:
    blurred = blur(images, [0.0, 1.2, 0.5])
    assert torch.equal(blurred[0], images[0])
    for row, sigma in ((1, 1.2), (2, 0.5)):  # radius 3 * 1.2 rounded up
        torch.testing.assert_close(blurred[row], F.gaussian_blur(images[row], [9, 9], [sigma, sigma]))
    assert torch.equal(blur(images, [0.0] * 3), images)


def test_a_view_is_its_part_of_the_image() -> None:
    one = sample(40, 30)
    whole = CropParams((0, 0, 40, 30))
    view = make_views([one], [whole], 32, DEVICE)[0]
    expected = F.normalize(F.resize(one.image, [32, 32], antialias=True).float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
    flipped = make_views([one], [dataclasses.replace(whole, flip=True)], 32, DEVICE)[0]
    torch.testing.assert_close(flipped, expected.flip(2), rtol=0, atol=1e-5)
    corner = make_views([one], [CropParams((8, 0, 32, 30))], 32, DEVICE)[0]
    assert not torch.allclose(corner, expected)


def test_drawn_views_depend_on_their_seed_alone_and_stay_inside() -> None:
    assert draw_crop((1, 2, 3), (50, 70), 64, RECIPE) == draw_crop((1, 2, 3), (50, 70), 64, RECIPE)
    drawn = [draw_crop((0, position, 1), (50, 70), 64, RECIPE) for position in range(200)]
    assert len({view.box for view in drawn}) > 190
    for view in drawn:
        top, left, height, width = view.box
        assert top >= 0 and left >= 0 and top + height <= 50 and left + width <= 70
        assert height * width > 0.18 * 50 * 70  # 0.2, less what rounding takes
        assert 0.6 <= view.factors[0] <= 1.4 and abs(view.factors[3]) <= 0.1
    share = {
        "flip": sum(view.flip for view in drawn),
        "gray": sum(view.factors[2] == 0 for view in drawn),
        "blur": sum(view.sigma > 0 for view in drawn),
    }
    # 200 draws with p = 0.5, 0.2 and 0.5: within four deviations.
    assert 72 < share["flip"] < 128 and 17 < share["gray"] < 63 and 72 < share["blur"] < 128


@pytest.mark.parametrize("size_hw", [(1, 1), (2, 500), (500, 2)])
def test_odd_images_have_views_too(size_hw: tuple[int, int]) -> None:
    params = [draw_crop((0, position, 1), size_hw, 32, RECIPE) for position in range(20)]
    views = make_views([sample(*size_hw)] * 20, params, 32, DEVICE)
    assert views.shape == (20, 3, 32, 32) and views.isfinite().all()
