"""The semantic branch of HTC: a class for every pixel, and features that help to find boxes and masks."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.ops import Conv2dNormActivation

from aligndet_cli.data.batch import NO_CLASS, BoxTargets
from aligndet_cli.detectors.parts.fpn import conv_tower
from aligndet_cli.detectors.parts.roi_head import SEMANTIC_STRIDE, kaiming_convs
from aligndet_cli.detectors.parts.rpn import STRIDES

NUM_CONVS = 4
PLACE = STRIDES.index(SEMANTIC_STRIDE)  # of the level that the others are resized to


class SemanticHead(nn.Module):
    """All levels of the pyramid in one map, from which come classes of pixels, and features for RoIs.

    Source: Chen et al., CVPR 2019, section 3.3; mmdetection `FusedSemanticHead`, including its initial weights.

    Args:
        channels: width of the pyramid and of all convolutions.
        num_classes: P, classes of pixels.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(
            Conv2dNormActivation(channels, channels, 1, norm_layer=None) for _ in STRIDES
        )
        self.convs = conv_tower(channels, NUM_CONVS, "none")
        self.embedding = Conv2dNormActivation(channels, channels, 1, norm_layer=None)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        kaiming_convs(self)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (B, C, H/8, W/8) features and (B, P, H/8, W/8) logits from P2..P6, (B, C, H, W) each."""
        size_hw = levels[PLACE].shape[-2:]
        resized = [
            level if place == PLACE else interpolate(level, size_hw, mode="bilinear", align_corners=True)
            for place, level in enumerate(levels)
        ]
        same_size = (conv(level) for conv, level in zip(self.lateral_convs, resized, strict=True))
        hidden = self.convs(functools.reduce(torch.add, same_size))
        return self.embedding(hidden), self.logits(hidden)


def semantic_loss(logits: Tensor, targets: Sequence[BoxTargets]) -> Tensor:
    """Return the scalar mean cross-entropy of the pixels that have a class; 0 if there are none.

    Every eighth pixel of every eighth row counts, as in mmdetection's `SegRescale`. Later versions of its
    `FusedSemanticHead` take the mean over all pixels, padding included; ours is that of the earlier ones.

    Args:
        logits: (B, P, H/8, W/8).
        targets: with the classes of all H x W pixels of the batch.
    """
    sampled = []
    for of_image in targets:
        assert of_image.pixel_classes is not None
        sampled.append(of_image.pixel_classes[::SEMANTIC_STRIDE, ::SEMANTIC_STRIDE])
    classes = torch.stack(sampled).long().flatten()  # (B * H/8 * W/8,)
    # As rows, whose loss is deterministic on GPUs; that of maps is not.
    rows = logits.float().permute(0, 2, 3, 1).flatten(0, 2)
    loss = cross_entropy(rows, classes, ignore_index=NO_CLASS, reduction="sum")
    return loss / (classes != NO_CLASS).sum().clamp(min=1)
