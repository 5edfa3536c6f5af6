"""Random crops of images to squares, with random colours, on the training device, a batch at a time."""

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
_SIGMAS = (0.1, 2.0)  # blur in pixels, for views of _REFERENCE_SIDE
_REFERENCE_SIDE = 224


@dataclass(frozen=True)
class ViewRecipe:
    """Limits and probabilities of random changes; by default crops and flips only.

    Attributes:
        min_area: smallest share of the image's area in a crop.
        brightness, contrast, saturation: factors are drawn from 1 -+ this much.
        hue: largest turn, as a share of the circle.
        jitter_p, gray_p, blur_p, solarize_p: probability that a view is jittered (in all four), gray, blurred, or
            solarized.
    """

    min_area: float
    brightness: float = 0
    contrast: float = 0
    saturation: float = 0
    hue: float = 0
    jitter_p: float = 0
    gray_p: float = 0
    blur_p: float = 0
    solarize_p: float = 0


@dataclass(frozen=True)
class CropParams:
    """Parameters of one view of an image.

    Attributes:
        box: top, left, height and width in pixels of the image.
        factors: brightness, contrast, saturation (1 = unchanged) and hue (0 = unchanged, 1 = full circle).
        sigma: blur in pixels of the view; 0 = none.
        solarize: turn the brighter half of each channel's levels into their negatives.
    """

    box: tuple[int, int, int, int]
    flip: bool = False
    factors: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)
    sigma: float = 0.0
    solarize: bool = False


def draw_crop(seed: tuple[int, ...], size_hw: tuple[int, int], side: int, recipe: ViewRecipe) -> CropParams:
    """Draw the parameters of a view; they depend on the arguments alone.

    Source: MoCo v2 and SimSiam, official code: random resized crop, colour jitter, gray, blur, flip. Their
        blur is in pixels of a 224 px view; ours scales with the side of the view. SoCo solarizes after the blur, too.
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
    solarize = float(torch.rand(1, generator=generator, dtype=torch.float64)) < recipe.solarize_p
    return CropParams(_draw_box(attempts, size_hw, recipe.min_area), flip < 0.5, factors, sigma, solarize)


def make_views(samples: Sequence[Sample], params: Sequence[CropParams], side: int, device: torch.device) -> Tensor:
    """Return a normalised view of each of B samples, on the device: (B, 3, S, S) with S = `side`."""
    crops = [
        F.resized_crop(sample.image.to(device, non_blocking=True), *view.box, [side, side], antialias=True)
        for sample, view in zip(samples, params, strict=True)
    ]
    pixels = torch.stack(crops).float() / 255
    flips = torch.tensor([view.flip for view in params], device=device)
    pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
    pixels = blur(change_colours(pixels, [view.factors for view in params]), [view.sigma for view in params])
    if any(view.solarize for view in params):
        chosen = torch.tensor([view.solarize for view in params], device=device)
        pixels = torch.where(chosen[:, None, None, None] & (pixels >= 0.5), 1 - pixels, pixels)
    return F.normalize(pixels, list(MEAN), list(STD)).contiguous(memory_format=torch.channels_last)


def change_colours(pixels: Tensor, factors: Sequence[tuple[float, float, float, float]]) -> Tensor:
    """Change brightness, contrast, saturation and hue of images (B, 3, H, W) in 0..1, each by its own factors.

    All four changes are linear, so one 3x3 matrix and one offset per image do for the whole batch; torchvision's
    functions take one factor for all images. torchvision clips after each change, in random order, we after the last;
    its hue turns HSV, ours the chroma plane of YIQ.
    """
    matrices, weights = zip(*(_colour_matrix(*each) for each in factors), strict=True)
    matrix = torch.tensor(matrices, dtype=pixels.dtype, device=pixels.device)  # (B, 3, 3)
    weight = torch.tensor(weights, dtype=pixels.dtype, device=pixels.device)  # (B,)
    gray = torch.tensor(GRAY, dtype=pixels.dtype, device=pixels.device)
    mean_gray = pixels.mean(dim=(2, 3)) @ gray  # (B,)
    changed = torch.baddbmm((weight * mean_gray)[:, None, None], matrix, pixels.flatten(2))  # (B, 3, H * W)
    return changed.view_as(pixels).clamp(0, 1)


def blur(pixels: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Blur images (B, 3, H, W), each by a Gaussian with its own sigma in pixels; 0 does not blur."""
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
    """Return top, left, height and width of the first attempt that fits, else of the centre, as torchvision does."""
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
    """Return the 3x3 matrix that colours are multiplied with, and the weight of the image's mean gray to add."""
    gray = torch.tensor(GRAY, dtype=torch.float64).expand(3, 3)
    saturate = saturation * torch.eye(3, dtype=torch.float64) + (1 - saturation) * gray
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=torch.float64)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq @ saturate * (contrast * brightness)
    return matrix.tolist(), (1 - contrast) * brightness
