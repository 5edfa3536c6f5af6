"""Turn samples into batches on the training device: resize, flip, colour, normalise, pad.

All random numbers are drawn beforehand on the CPU (`ViewParams`), from the seed and the sample's place in the run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from aligndet_cli.data.batch import NO_CLASS, PAD_DIVISOR, BoxTargets, ImageBatch
from aligndet_cli.data.sample import Sample, mix_seed

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB in 0..1
STD = (0.229, 0.224, 0.225)

ColourOp = Literal[
    "identity", "autocontrast", "equalize", "solarize", "color", "contrast", "brightness", "sharpness", "posterize"
]
COLOUR_OPS: tuple[ColourOp, ...] = get_args(ColourOp)
PLAIN_OPS: frozenset[ColourOp] = frozenset({"identity", "autocontrast", "equalize"})  # have no magnitude
MAX_MAGNITUDE = 10  # only 1..9 are drawn


class Crop(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class ViewParams:
    """Parameters of one view of an image.

    Attributes:
        short_side, long_side: pixels; short side after resizing, unless the long side would exceed its limit.
        flip: mirror left and right.
        colour: the colour operation; exactly one.
        magnitude: strength of the operation, 1..9 of 10; `PLAIN_OPS` ignore it.
    """

    short_side: int
    long_side: int
    flip: bool = False
    colour: ColourOp = "identity"
    magnitude: int = 1


def draw_view(seed: tuple[int, ...], short_sides: Sequence[int], long_side: int, *, with_colour: bool) -> ViewParams:
    """Draw view parameters that depend on `seed` alone.

    Source: AlignDet 4.1: one of the short sides, flip with p = 0.5, exactly one colour operation; `rand_aug.py` of the
        authors: at a magnitude drawn evenly from 1..9.
    """
    generator = torch.Generator().manual_seed(mix_seed(*seed))
    choice, op = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    flip, magnitude = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return ViewParams(
        short_side=short_sides[int(choice * len(short_sides))],
        long_side=long_side,
        flip=flip < 0.5,
        colour=COLOUR_OPS[int(op * len(COLOUR_OPS))] if with_colour else "identity",
        magnitude=1 + int(magnitude * (MAX_MAGNITUDE - 1)),
    )


def resized_hw(size_hw: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Return height and width after the keep-ratio resize.

    Source: mmdetection's `Resize`: scale = min(long/max, short/min), sides rounded half up.
    """
    scale = min(long_side / max(size_hw), short_side / min(size_hw))
    height, width = (max(math.floor(side * scale + 0.5), 1) for side in size_hw)
    return height, width


def resize(image: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Resize an image (3, H, W) uint8 to (3, h, w), bilinear without antialiasing like mmdetection's cv2."""
    if tuple(image.shape[-2:]) == size_hw:
        return image
    return F.resize(image, list(size_hw), InterpolationMode.BILINEAR, antialias=False)


def crop_sample(sample: Sample, crop: Crop, device: torch.device) -> Sample:
    """Return a part of a sample, on the device; boxes are cut at its border, and boxes wholly outside are left out."""
    top, left, height, width = crop
    limits = torch.tensor([width, height, width, height])
    boxes = (sample.boxes - torch.tensor([left, top, left, top])).clamp(min=0).minimum(limits)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)

    def part_of(pixels: Tensor) -> Tensor:
        # Move the whole image, then cut: a slice of pinned memory is not contiguous and would be copied twice.
        return pixels.to(device, non_blocking=True)[:, top : top + height, left : left + width]

    masks = sample.masks
    if masks is not None:
        masks = part_of(masks if kept.all() else masks[kept])
    pixel_classes = None if sample.pixel_classes is None else part_of(sample.pixel_classes[None])[0]
    return replace(
        sample,
        image=part_of(sample.image),
        boxes=boxes[kept],
        class_ids=sample.class_ids[kept],
        masks=masks,
        pixel_classes=pixel_classes,
    )


def apply_view(sample: Sample, params: ViewParams, device: torch.device) -> tuple[Tensor, BoxTargets]:
    """Return one view of a sample: normalised pixels (3, h, w), and boxes, masks and classes of pixels on them.

    No box is dropped, so row i of the boxes stays proposal i. The image is flipped before it is padded: the
    official pipeline pads first and its boxes are off by the padding.
    """
    height, width = sample.image.shape[-2:]
    new_hw = resized_hw((height, width), params.short_side, params.long_side)
    image = resize(sample.image.to(device, non_blocking=True), new_hw)
    # Computed on the CPU: a plain copy of the scales to a GPU would wait for all its queued work.
    boxes = sample.boxes * torch.tensor([new_hw[1] / width, new_hw[0] / height] * 2)  # (N, 4)

    def follow(pixels: Tensor) -> Tensor:
        resized = F.resize(pixels.to(device, non_blocking=True), list(new_hw), InterpolationMode.NEAREST)
        return resized.flip(-1) if params.flip else resized

    masks = None if sample.masks is None else follow(sample.masks)
    pixel_classes = None if sample.pixel_classes is None else follow(sample.pixel_classes[None])[0]
    if params.flip:
        image = image.flip(-1)
        boxes = torch.stack([new_hw[1] - boxes[:, 2], boxes[:, 1], new_hw[1] - boxes[:, 0], boxes[:, 3]], dim=1)
    pixels = normalise(change_colour(image, params.colour, params.magnitude))
    boxes, class_ids = (part.to(device, non_blocking=True) for part in (boxes, sample.class_ids))
    return pixels, BoxTargets(boxes, class_ids, masks=masks, pixel_classes=pixel_classes)


def change_colour(image: Tensor, op: ColourOp, magnitude: int) -> Tensor:
    """Apply one colour operation to an image (3, H, W) uint8, at a magnitude of 1..9; equals Pillow within one level.

    Source: the authors' `rand_aug.py`: enhance factors 0.28..1.72, solarize from 25..230 on, posterize to 4..1 bits.
        Theirs pads the image to a multiple of 32 first, so that autocontrast, equalize and contrast see the black
        border too; ours see the image alone.
    """
    factor = 0.1 + 1.8 * magnitude / MAX_MAGNITUDE
    operations = {
        "identity": lambda: image,
        "autocontrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
        "solarize": lambda: F.solarize(image, threshold=256 * magnitude // MAX_MAGNITUDE),
        "color": lambda: F.adjust_saturation(image, factor),
        "contrast": lambda: F.adjust_contrast(image, factor),
        "brightness": lambda: F.adjust_brightness(image, factor),
        "sharpness": lambda: F.adjust_sharpness(image, factor),
        "posterize": lambda: F.posterize(image, bits=4 - 4 * magnitude // MAX_MAGNITUDE),
    }
    return operations[op]()


def normalise(image: Tensor) -> Tensor:
    """Return an image (3, H, W) uint8 as float32, normalised with ImageNet's mean and deviation."""
    mean, deviation = (torch.tensor(of).view(3, 1, 1).to(image.device, non_blocking=True) for of in (MEAN, STD))
    return (image.float() / 255.0).sub_(mean).div_(deviation)


def pad_to_batch(images: Sequence[Tensor], padded_side: int = 0) -> ImageBatch:
    """Put normalised images (3, H, W) of any sizes into one tensor, padded with zeros at the bottom and right.

    The batch is as high and wide as its largest image, and as `padded_side`, rounded up to a multiple of 32.
    """
    sizes_hw = tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)
    largest = (max(*sides, padded_side) for sides in zip(*sizes_hw, strict=True))
    height, width = (math.ceil(side / PAD_DIVISOR) * PAD_DIVISOR for side in largest)
    pixels = torch.stack([pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images])
    return ImageBatch(pixels, sizes_hw)


def make_batch(
    samples: Sequence[Sample],
    params: Sequence[ViewParams],
    device: torch.device,
    *,
    instance_offset: int | None = None,
    padded_side: int = 0,
) -> tuple[ImageBatch, list[BoxTargets]]:
    """Return one view of every sample, as a batch on the device with its targets.

    Args:
        instance_offset: id of the first box of the batch. Ids count over all boxes of the batch in order, so they are
            the same in every view. None gives targets without instance ids.
        padded_side: see `pad_to_batch`.
    """
    images, targets = [], []
    for sample, view in zip(samples, params, strict=True):
        image, of_image = apply_view(sample, view, device)
        if instance_offset is not None:
            ids = torch.arange(instance_offset, instance_offset + len(of_image.boxes), device=device)
            of_image = replace(of_image, instance_ids=ids)
            instance_offset += len(ids)
        images.append(image)
        targets.append(of_image)
    batch = pad_to_batch(images, padded_side)
    height, width = batch.pixels.shape[-2:]
    return batch, [_padded(of_image, height, width) for of_image in targets]


def _padded(targets: BoxTargets, height: int, width: int) -> BoxTargets:
    def enlarge(pixels: Tensor | None, value: int) -> Tensor | None:
        if pixels is None:
            return None
        return pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]), value=value)

    return replace(targets, masks=enlarge(targets.masks, 0), pixel_classes=enlarge(targets.pixel_classes, NO_CLASS))
