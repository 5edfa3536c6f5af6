"""Random crops and colours of whole images, on the training device, a batch at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad
from torchvision.transforms.v2 import functional as F

from aligndet_cli.data.sample import Sample, mix_seed
from aligndet_cli.data.transforms import MEAN, STD

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma, as in torchvision
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_ASPECTS = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
_SIGMAS = (0.1, 2.0)  # of the blur, in pixels of a view of _REFERENCE_SIDE
_REFERENCE_SIDE = 224


@dataclass(frozen=True)
class ViewRecipe:
    """How strongly views differ.

    Attributes:
        min_area: smallest share of the image's area in a crop.
        brightness, contrast, saturation: a factor of 1 -+ this much; hue: a turn of up to -+ this share of the circle.
        jitter_p, gray_p, blur_p: how likely a view is jittered (in all four), gray, or blurred.
    """

    min_area: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    jitter_p: float
    gray_p: float
    blur_p: float


@dataclass(frozen=True)
class CropParams:
    """What is done to one image to make one view of it.

    Attributes:
        box: top, left, height and width in pixels of the image.
        factors: brightness, contrast, saturation (1 = unchanged) and hue (0 = unchanged, 1 = full circle).
        sigma: of the blur, in pixels of the view; 0 = none.
    """

    box: tuple[int, int, int, int]
    flip: bool = False
    factors: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)
    sigma: float = 0.0


def draw_crop(seed: tuple[int, ...], size_hw: tuple[int, int], side: int, recipe: ViewRecipe) -> CropParams:
    """Random view parameters that depend on `seed` (and the size of the image) alone.

    Source: MoCo v2 and SimSiam, official code: random resized crop, colour jitter, gray, blur, flip. There the
        blur is in pixels of a 224 px view; ours scales with the side of the view.
    """
    generator = torch.Generator().manual_seed(mix_seed(*seed))
    numbers = iter(torch.rand(4 * _CROP_ATTEMPTS + 9, generator=generator, dtype=torch.float64).tolist())
    attempts = [(next(numbers), next(numbers), next(numbers), next(numbers)) for _ in range(_CROP_ATTEMPTS)]
    flip, jitter, gray, blur = (next(numbers) for _ in range(4))
    brightness, contrast, saturation, hue = (2 * next(numbers) - 1 for _ in range(4))
    factors = (1.0, 1.0, 1.0, 0.0)
    if jitter < recipe.jitter_p:
        factors = (
            1 + recipe.brightness * brightness,
            1 + recipe.contrast * contrast,
            1 + recipe.saturation * saturation,
            recipe.hue * hue,
        )
    if gray < recipe.gray_p:
        factors = (factors[0], factors[1], 0.0, 0.0)
    low, high = _SIGMAS
    sigma = (low + (high - low) * next(numbers)) * side / _REFERENCE_SIDE if blur < recipe.blur_p else 0.0
    return CropParams(_draw_box(attempts, size_hw, recipe.min_area), flip < 0.5, factors, sigma)


def make_views(samples: Sequence[Sample], params: Sequence[CropParams], side: int, device: torch.device) -> Tensor:
    """(B, 3, side, side) normalised views on the device, one of every sample."""
    crops = [
        F.resized_crop(sample.image.to(device, non_blocking=True), *view.box, [side, side], antialias=True)
        for sample, view in zip(samples, params, strict=True)
    ]
    pixels = torch.stack(crops).float() / 255
    flips = torch.tensor([view.flip for view in params], device=device)
    pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
    pixels = blur(change_colours(pixels, [view.factors for view in params]), [view.sigma for view in params])
    return F.normalize(pixels, list(MEAN), list(STD)).contiguous(memory_format=torch.channels_last)


def change_colours(pixels: Tensor, factors: Sequence[tuple[float, float, float, float]]) -> Tensor:
    """Images (B, 3, H, W) in 0..1 with brightness, contrast, saturation and hue changed, each by factors of its own.

    All four are linear, so that one 3x3 matrix and one offset per image do for the whole batch; torchvision's
    functions take one factor for all images. They clip after each of the four, in random order, we after the last;
    their hue turns HSV, ours the chroma plane of YIQ.
    """
    matrices, weights = zip(*(_colour_matrix(*each) for each in factors), strict=True)
    matrix = torch.tensor(matrices, dtype=pixels.dtype, device=pixels.device)  # (B, 3, 3)
    weight = torch.tensor(weights, dtype=pixels.dtype, device=pixels.device)  # (B,)
    gray = torch.tensor(GRAY, dtype=pixels.dtype, device=pixels.device)
    mean_gray = pixels.mean(dim=(2, 3)) @ gray  # (B,)
    changed = torch.baddbmm((weight * mean_gray)[:, None, None], matrix, pixels.flatten(2))  # (B, 3, H * W)
    return changed.view_as(pixels).clamp(0, 1)


def blur(pixels: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Images (B, 3, H, W), each blurred by a Gaussian of its own deviation in pixels; 0 leaves it as it is."""
    rows = [row for row, sigma in enumerate(sigmas) if sigma > 0]
    if not rows:
        return pixels
    radius = min(math.ceil(3 * max(sigmas)), min(pixels.shape[2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=pixels.dtype)
    deviations = torch.tensor([sigmas[row] for row in rows], dtype=pixels.dtype)
    kernels = torch.exp(-0.5 * (offsets / deviations[:, None]) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).to(pixels.device)  # (R, 2 * radius + 1)
    kernels = kernels.repeat_interleave(3, dim=0)[:, None, None, :]  # one per image and channel
    chosen = torch.tensor(rows, device=pixels.device)
    height, width = pixels.shape[2:]
    blurred = pixels[chosen].reshape(1, -1, height, width)  # (1, 3 * R, H, W)
    blurred = pad(blurred, (radius, radius, radius, radius), mode="reflect")
    blurred = conv2d(blurred, kernels, groups=len(kernels))
    blurred = conv2d(blurred, kernels.transpose(2, 3), groups=len(kernels))
    return pixels.index_copy(0, chosen, blurred.view(-1, 3, height, width))


def _draw_box(
    attempts: Sequence[tuple[float, float, float, float]], size_hw: tuple[int, int], min_area: float
) -> tuple[int, int, int, int]:
    """As torchvision's `RandomResizedCrop`: the first attempt that fits, else the largest central crop."""
    height, width = size_hw
    low, high = (math.log(aspect) for aspect in _ASPECTS)
    for area, aspect, top, left in attempts:
        wanted = height * width * (min_area + (1 - min_area) * area)
        ratio = math.exp(low + (high - low) * aspect)
        crop_width, crop_height = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return int(top * (height - crop_height + 1)), int(left * (width - crop_width + 1)), crop_height, crop_width
    ratio = min(max(width / height, _ASPECTS[0]), _ASPECTS[1])
    crop_width, crop_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - crop_height) // 2, (width - crop_width) // 2, max(crop_height, 1), max(crop_width, 1)


def _colour_matrix(
    brightness: float, contrast: float, saturation: float, hue: float
) -> tuple[list[list[float]], float]:
    """What colours are multiplied with, and the weight of the image's mean gray that is added."""
    gray = torch.tensor(GRAY, dtype=torch.float64).expand(3, 3)
    saturate = saturation * torch.eye(3, dtype=torch.float64) + (1 - saturation) * gray
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=torch.float64)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq @ saturate * (contrast * brightness)
    return matrix.tolist(), (1 - contrast) * brightness
