"""Inputs of a detector: images in one tensor, and the boxes it is trained on."""

from dataclasses import dataclass

from torch import Tensor

PAD_DIVISOR = 32
NO_CLASS = 255  # of a pixel: COCO-stuff's unlabelled ones, and padding


@dataclass(frozen=True)
class ImageBatch:
    """Normalised images of different sizes in one tensor.

    Attributes:
        pixels: (B, 3, H, W), ImageNet-normalised RGB, zero-padded at the bottom and right.
        sizes_hw: height and width of each image in pixels, without padding.
    """

    pixels: Tensor
    sizes_hw: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BoxTargets:
    """Boxes of one image that a detector is trained on, in the pixels of the current view.

    Attributes:
        boxes: (N, 4) xyxy.
        class_ids: (N,) int64, 0..K-1; all 0 ("object") in the pretext, or the cluster id for DETR.
        instance_ids: (N,) int64, id of each proposal, unique in the batch; None outside of the pretext.
        masks: (N, H, W) bool, padded like the images, all False for a box without mask; None if the detector trains
            without masks.
        pixel_classes: (H, W) uint8, class of every pixel or `NO_CLASS`, padded like the images; None if the detector
            does not train on them.
    """

    boxes: Tensor
    class_ids: Tensor
    instance_ids: Tensor | None = None
    masks: Tensor | None = None
    pixel_classes: Tensor | None = None
