"""Images as Python programs have them: files, arrays, Pillow's images, tensors."""

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from aligndet_cli.data.images import read_image, upright_pixels
from aligndet_cli.errors import DataError

# A file, (H, W, 3) uint8 RGB, a Pillow image, or (3, H, W) as float in 0..1 or as uint8.
AnyImage: TypeAlias = str | Path | NDArray[np.uint8] | Image.Image | Tensor
_KINDS = "give a path, an (H, W, 3) uint8 array in RGB, a Pillow image, or a (3, H, W) tensor, float in 0..1 or uint8"
_NO_LISTS = (bytes, bytearray, memoryview, io.IOBase, Mapping)  # although one can go through them
_TOLERANCE = 1e-3  # by which augmentations may leave 0..1


def one_by_one(images: AnyImage | Iterable[AnyImage]) -> Iterator[AnyImage]:
    """Yield the images of an iterable or of a (B, ...) batch, or the single one, as they are."""
    is_single = isinstance(images, str | Path | Image.Image)
    if not is_single and isinstance(images, np.ndarray | Tensor):
        is_single = images.ndim <= 3
    if is_single:
        yield images  # type: ignore[misc]  # no iterable
    elif isinstance(images, Iterable) and not isinstance(images, _NO_LISTS):
        yield from images
    else:
        raise DataError(f"images: are of type {type(images).__name__}; {_KINDS}")


def as_pixels(image: AnyImage, name: str) -> Tensor:
    """Return an image as (3, H, W) uint8 RGB, upright; floats are rounded to the 256 levels of an image file.

    Args:
        name: of the image in messages, such as `images[3]`, if it has no path.

    Raises:
        DataError: it is no image, cannot be read, or has values that no image has.
    """
    if isinstance(image, Tensor):
        return _of_tensor(image, name)
    if isinstance(image, str | Path):
        pixels = read_image(Path(image))
    elif isinstance(image, Image.Image):
        pixels = upright_pixels(image, Path(getattr(image, "filename", "") or name))
    elif isinstance(image, np.ndarray):
        pixels = _of_array(image, name)
    else:
        raise DataError(f"{name}: is of type {type(image).__name__}; {_KINDS}")
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _of_array(image: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(f"{name}: is an array {image.shape} of {image.dtype}; {_KINDS}")
    return image


def _of_tensor(image: Tensor, name: str) -> Tensor:
    if image.is_meta or image.layout is not torch.strided:
        raise DataError(f"{name}: is a tensor without values of its own, or a sparse one; {_KINDS}")
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise DataError(f"{name}: is a tensor {tuple(image.shape)}; {_KINDS}")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise DataError(f"{name}: is a tensor of {image.dtype}; {_KINDS}")
    low, high = (float(limit) for limit in image.detach().aminmax())
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        raise DataError(
            f"{name}: has values from {low:.4g} to {high:.4g}; floats are in 0..1, and the detector normalises them"
        )
    return (image.detach().float() * 255.0).round_().clamp_(0, 255).to(torch.uint8)
