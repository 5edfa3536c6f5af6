"""Towers of convolutions with norms, and torchvision's FPN with mmdetection's norms, extra levels and weights."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad, relu
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

NormName = Literal["none", "batch", "group"]
# "auto": the stage decides (AlignDet: none in pre-training, batch in fine-tuning); without a stage it is none.
NeckNorm = Annotated[
    Literal["auto", "none", "batch", "group"],
    Field(description="Norm in the feature pyramid; auto leaves it to the stage."),
]
# Input of P6. P7 is made of P6, after a ReLU with "from_c5_relu" and "from_p5".
ConvExtraName = Literal["from_c5", "from_c5_relu", "from_p5"]
# "pooled": P6 is every other cell of P5, and there is no P7.
ExtraName = ConvExtraName | Literal["none", "pooled"]
NUM_GROUPS = 32  # mmdetection's GN configs, and the group norm paper


def norm_layer(name: NeckNorm) -> Callable[[int], nn.Module] | None:
    """Return a function from a number of channels to a norm, or None where a bias takes its place."""
    if name == "batch":
        return nn.BatchNorm2d
    return partial(nn.GroupNorm, NUM_GROUPS) if name == "group" else None


def conv_tower(channels: int, num_convs: int, norm: NormName) -> nn.Sequential:
    """Build 3x3 convolutions with ReLU that keep width and resolution; a norm takes the place of the bias."""
    convs = [Conv2dNormActivation(channels, channels, norm_layer=norm_layer(norm)) for _ in range(num_convs)]
    return nn.Sequential(*convs)


def check_group_channels(neck_channels: int) -> None:
    """Make sure that group norm gets two channels a group: a single one has no spread in a map of one cell.

    Raises:
        ValueError: too few channels, or no multiple of the number of groups.
    """
    if neck_channels % NUM_GROUPS or neck_channels == NUM_GROUPS:
        raise ValueError(f"neck_channels must be a multiple of {NUM_GROUPS}, from {2 * NUM_GROUPS} on, for group norm")


class ExtraLevels(ExtraFPNBlock):
    """P6 from the backbone's or the pyramid's last map and P7 from P6, both by a 3x3 convolution of stride 2.

    Source: mmdetection FPN `add_extra_convs="on_input"` (RetinaNet), and `"on_output"` with
    `relu_before_extra_convs`, a ReLU between the two (FCOS). `LastLevelP6P7` of torchvision and detectron2 has the
    ReLU always and norms never.

    Args:
        in_channels: width of the map that P6 is made of.
        channels: width of the pyramid.
        norm: the same norm as in the rest of the pyramid.
        source: input of P6, and ReLU before P7 or not.
    """

    def __init__(self, in_channels: int, channels: int, norm: NeckNorm, source: ConvExtraName) -> None:
        super().__init__()
        self.from_output = source == "from_p5"
        self.has_relu = source != "from_c5"
        conv = partial(
            Conv2dNormActivation, kernel_size=3, stride=2, norm_layer=norm_layer(norm), activation_layer=None
        )
        self.p6 = conv(in_channels, channels)
        self.p7 = conv(channels, channels)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7; the signature is torchvision's.

        Args:
            results: pyramid maps, (B, C, H, W) each, finest first.
            x: the backbone's maps, (B, C, H, W) each.
            names: one per map of `results`.
        """
        p6 = self.p6(_not_one_wide(results[-1] if self.from_output else x[-1]))
        return [*results, p6, self.p7(_not_one_wide(relu(p6) if self.has_relu else p6))], [*names, "p6", "p7"]


def _not_one_wide(x: Tensor) -> Tensor:
    """Give a map (B, C, H, 1) a second column, zeros: a convolution of stride 2 takes it for padding.

    Torch (2.14, bfloat16 on the CPU) would fill gradients of the weights from uninitialized memory. Such maps come from
    images of at most 64 pixels.
    """
    return pad(x, (0, 1)) if torch.is_autocast_enabled("cpu") and x.shape[-1] == 1 else x


class FPN(nn.Module):
    """Maps of equal width at several strides, with top-down context.

    Source: Lin et al., CVPR 2017, as in mmdetection: with a norm, every convolution has one and no bias, the extra
    levels included; Xavier uniform weights (torchvision: Kaiming uniform).

    Args:
        in_channels: width per backbone level, e.g. `{"c3": 512, "c4": 1024, "c5": 2048}`.
        channels: width of all outputs.
        norm: norm of all convolutions.
        extra_levels: P6 and P7 or not, and their input.
    """

    def __init__(self, in_channels: dict[str, int], channels: int, norm: NeckNorm, *, extra_levels: ExtraName) -> None:
        super().__init__()
        self.levels = tuple(in_channels)
        widths = list(in_channels.values())
        extra: ExtraFPNBlock | None = None
        if extra_levels == "pooled":
            extra = LastLevelMaxPool()
        elif extra_levels != "none":
            extra = ExtraLevels(channels if extra_levels == "from_p5" else widths[-1], channels, norm, extra_levels)
        self.pyramid = FeaturePyramidNetwork(widths, channels, extra_blocks=extra, norm_layer=norm_layer(norm))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: dict[str, Tensor]) -> list[Tensor]:
        """Return the pyramid's maps (B, C, H, W), finest first, from the backbone's maps (B, C, H, W) by level."""
        return list(self.pyramid({level: maps[level] for level in self.levels}).values())
