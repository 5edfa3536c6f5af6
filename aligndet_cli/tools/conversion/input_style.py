"""Input styles of other programs: the scale and order of their pixels, and the place of strides in their ResNets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligndet_cli.data.transforms import MEAN, STD
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.tools.conversion.mmdet_config import Tree, at, mappings_in

CONV1 = "backbone.conv1.weight"
BOTTLENECK = "backbone.layer1.0.conv3.weight"  # only ResNet-50 and 101 have it
BUFFERS = ("pixel_mean", "pixel_std")  # of detectron2
LEVELS = 255.0  # of a pixel
TOLERANCE = 0.01  # of a mean, in pixel levels: programs write means with three decimals


@dataclass(frozen=True)
class InputStyle:
    """Preparation of pixels in another program.

    Attributes:
        mean, std: subtracted and divided by, for pixels of 0..255, in the order of the channels.
        is_bgr: True if the channels are blue, green and red.
        stride_in_1x1: see `BackboneConfig`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_bgr: bool
    stride_in_1x1: bool


_MEAN = tuple(LEVELS * mean for mean in MEAN)
_STD = tuple(LEVELS * std for std in STD)
# Under mmdetection's names. Detectron2 calls weights of the first style MSRA's, of the second torchvision's.
STYLES = {
    "caffe": InputStyle(_MEAN[::-1], (1.0, 1.0, 1.0), is_bgr=True, stride_in_1x1=True),
    "pytorch": InputStyle(_MEAN, _STD, is_bgr=False, stride_in_1x1=False),
}


def apply_style(tensors: dict[str, Tensor], style: InputStyle, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Make order and scale of the channels a part of the first convolution, so that the detector takes our images.

    The result is exact: both programs subtract the mean first and pad with zeros afterwards, so the mean must be ours.

    Args:
        tensors: state dict under our names.

    Returns:
        the tensors, and settings of the backbone.

    Raises:
        WeightsError: the mean is not ours, or the backbone is not a ResNet.
    """
    if _is_ours(style):
        return tensors, {}
    mean, std = ((of[::-1] if style.is_bgr else of) for of in (style.mean, style.std))
    if any(abs(theirs - ours) > TOLERANCE for theirs, ours in zip(mean, _MEAN, strict=True)):
        given, ours = (", ".join(f"{value:.2f}" for value in of) for of in (mean, _MEAN))
        raise WeightsError(
            f"{file}: its images have the mean {given} (RGB) subtracted, ours {ours}; it would detect something else"
        )
    if CONV1 not in tensors:
        raise WeightsError(f"{file}: only a ResNet can see other images than ours; it has no {CONV1}")
    kernel = tensors[CONV1]
    kernel = kernel.flip(1) if style.is_bgr else kernel
    scale = kernel.new_tensor(_STD) / kernel.new_tensor(std)
    settings = {"stride_in_1x1": True} if style.stride_in_1x1 and BOTTLENECK in tensors else {}
    return {**tensors, CONV1: kernel * scale[:, None, None]}, settings


def _is_ours(style: InputStyle) -> bool:
    """Return True if a style is that of our images; configs write 116.28 where 255 * 0.456 is a little more."""
    ours = STYLES["pytorch"]
    if (style.is_bgr, style.stride_in_1x1) != (ours.is_bgr, ours.stride_in_1x1):
        return False
    pairs = zip(style.mean + style.std, ours.mean + ours.std, strict=True)
    return all(math.isclose(given, wanted, rel_tol=1e-6) for given, wanted in pairs)


def style_of_mmdet(config: Tree, model: Tree, asked: str | None, file: Path) -> InputStyle | None:
    """Return the style that is written in mmdetection's config; the style asked for if none is, or None.

    Args:
        config, model: all settings, and those of the detector.

    Raises:
        ConfigError: the config has another style than the one asked for.
        WeightsError: the config has `style='caffe'`, but no mean and deviation.
    """
    is_caffe = at(model, "backbone.style") == "caffe"
    for group in mappings_in(config):
        mean, std = (_three_numbers(group.get(key)) for key in ("mean", "std"))
        is_rgb = next((group[key] for key in ("to_rgb", "bgr_to_rgb") if isinstance(group.get(key), bool)), None)
        if mean and std and is_rgb is not None:
            told = InputStyle(mean, std, is_bgr=not is_rgb, stride_in_1x1=is_caffe)
            if asked is not None and told.is_bgr != STYLES[asked].is_bgr:
                raise ConfigError(
                    f"--style {asked}: the config in {file} says {'BGR' if told.is_bgr else 'RGB'}; leave it out"
                )
            return told
    if is_caffe and asked is None:
        raise WeightsError(
            f"{file}: has style='caffe', but no mean and deviation of its images; add --style caffe if they are those "
            "of detectron2's weights (103.53, 116.28, 123.675 in BGR, and 1)"
        )
    return None if asked is None else STYLES[asked]


def style_of_detectron2(tensors: Mapping[str, Tensor], asked: str | None, file: Path) -> InputStyle:
    """Return the style that follows from the buffers with mean and deviation, and from the style asked for.

    Deviations of 1 belong to detectors that started from MSRA's weights, whose 1x1 convolutions have the stride.

    Args:
        tensors: state dict, in which the buffers are (3, 1, 1).

    Raises:
        WeightsError: the file has no such buffers, and no style was asked for.
    """
    mean, std = (tuple(tensors[name].flatten().tolist()) if name in tensors else () for name in BUFFERS)
    if not mean or not std:
        if asked is None:
            raise WeightsError(
                f"{file}: does not tell how its images were normalised; add --style caffe (BGR with PIXEL_STD 1 and "
                "STRIDE_IN_1X1, as all R-50 and R-101 of the model zoo) or pytorch (RGB, started from torchvision's)"
            )
        return STYLES[asked]
    is_caffe = torch.allclose(torch.tensor(std), torch.ones(len(std))) if asked is None else asked == "caffe"
    return InputStyle(mean, std, is_bgr=mean[0] < mean[-1], stride_in_1x1=is_caffe)


def _three_numbers(value: Any) -> tuple[float, ...]:
    """Return a list of three numbers as a tuple; empty for anything else."""
    is_list = isinstance(value, list | tuple) and len(value) == len(MEAN)
    return tuple(map(float, value)) if is_list and all(type(part) in (int, float) for part in value) else ()
