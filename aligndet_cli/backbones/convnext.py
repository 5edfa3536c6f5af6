"""ConvNeXts as feature extractors, from torchvision's parts.

Source: Liu et al., CVPR 2022; the wrapping follows the authors' detectors: each map has its own layer norm, which
starts fresh, and a step between stages is frozen with the stage after it (mmpretrain's `frozen_stages`).
"""

from torch import Tensor, nn
from torchvision.models import ConvNeXt as TorchvisionConvNeXt
from torchvision.models import get_model
from torchvision.models.convnext import LayerNorm2d

from aligndet_cli.backbones.interface import Backbone, crop_maps, in_threes, pad_to_strides

NORM_EPS = 1e-6  # of all layer norms; the authors' code and torchvision


class ConvNeXt(Backbone):
    """Body of a ConvNeXt; its state dict has torchvision's keys without `classifier`, and `norm0` to `norm3`.

    The norm in `classifier`, which sees the mean of the last map, is left out, as in the authors' detectors.
    """

    family = "convnext"
    classifier = "classifier.2"
    additions = ("norm0.", "norm1.", "norm2.", "norm3.")

    def __init__(self, body: TorchvisionConvNeXt, name: str) -> None:
        # Even places of `features` are the stem and the steps between stages, odd ones the stages.
        widths = [body.features[2 * place][1].out_channels for place in range(1, 4)]
        channels = dict(zip(("c2", "c3", "c4", "c5"), [widths[0] // 2, *widths], strict=True))
        super().__init__(name, channels)
        self.features = body.features
        self.norm0, self.norm1, self.norm2, self.norm3 = (
            LayerNorm2d(width, eps=NORM_EPS) for width in channels.values()
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the maps of the four stages (B, C, H, W) by level; see `Backbone.forward`."""
        last = pad_to_strides(pixels)
        maps = {}
        for place, (level, norm) in enumerate(self._norms().items()):
            last = self.features[2 * place : 2 * place + 2](last)
            maps[level] = norm(last)
        return crop_maps(maps, pixels)

    def stem(self) -> list[nn.Module]:
        """Return the first convolution and its norm."""
        return [self.features[0]]

    def stages(self) -> list[list[nn.Module]]:
        """Return the blocks and norm of each level, after the first with the step that leads to it."""
        return [
            [norm, *self.features[max(2 * place, 1) : 2 * place + 2]]
            for place, norm in enumerate(self._norms().values())
        ]

    def layers(self) -> list[list[nn.Module]]:
        """Return the stem and the stages with the steps to them, the third in layers of three blocks.

        Source: the authors' object_detection/mmcv_custom/layer_decay_optimizer_constructor.py; as there,
            norms of levels are in none.
        """
        stem, first, step, second, to_third, third, to_last, last = self.features
        head, *others = in_threes(third)
        return [[stem], [first], [step, second], [to_third, *head], *others, [to_last, last]]

    def only_for(self, level: str) -> list[nn.Module]:
        """Return the norm of the level."""
        return [self._norms()[level]]

    def _norms(self) -> dict[str, nn.LayerNorm]:
        return dict(zip(self.channels, (self.norm0, self.norm1, self.norm2, self.norm3), strict=True))


def build_convnext(name: str, *, drop_path: float) -> ConvNeXt:
    """Build a ConvNeXt with torchvision's initial weights (truncated normal of 0.02, layer scale 1e-6).

    `drop_path` is the probability that the last block is left out for an image in training; it grows linearly from 0.
    """
    body = get_model(name, weights=None, stochastic_depth_prob=drop_path)
    assert isinstance(body, TorchvisionConvNeXt)
    return ConvNeXt(body, name)
