"""EfficientNet-Lite 0 to 2 as feature extractors: EfficientNets for small machines.

Source: Google's EfficientNet-Lite (2020): no squeeze-and-excitation, ReLU6, and the stem and the last convolution, like
the depth of the first and the last row, do not grow with the size. Their published weights need TensorFlow's padding
and TensorFlow's input, from -1 to 1.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torchvision.models import EfficientNet as TorchvisionEfficientNet
from torchvision.models.efficientnet import MBConv, MBConvConfig

from aligndet_cli.backbones.efficientnet import EfficientNet

# Factors on width and depth.
SIZES = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1), "efficientnet_lite2": (1.1, 1.2)}
# Of B0, by row: expansion, kernel, stride, channels in and out, blocks.
_ROWS = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
_LAST_WIDTH = 1280
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3
_NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class SameConv2d(nn.Conv2d):
    """Convolution that pads as TensorFlow's `SAME`: so that its output has `ceil(side / stride)` cells.

    At stride 2, an even side has one cell of padding less than an odd one, at the top and the left.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Convolve maps (B, C, H, W); sides are divided by the stride and rounded up."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (kernel - 1 - (side - 1) % stride for side in pixels.shape[-2:])
        padded = pad(pixels, (width // 2, width - width // 2, height // 2, height - height // 2))
        return conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class EfficientNetLite(EfficientNet):
    """Body of an EfficientNet-Lite; its tensors have the names that torchvision's EfficientNet gives them."""

    family = "efficientnet-lite"


def build_efficientnet_lite(name: str, *, drop_path: float) -> EfficientNetLite:
    """Build an EfficientNet-Lite with torchvision's initial weights for EfficientNet; `drop_path` as there."""
    width, depth = SIZES[name]
    block = partial(MBConv, se_layer=_no_squeeze)
    rows = [
        MBConvConfig(*row, width_mult=width, depth_mult=depth if 0 < place < len(_ROWS) - 1 else 1.0, block=block)
        for place, row in enumerate(_ROWS)
    ]
    body = TorchvisionEfficientNet(
        rows, dropout=0.0, stochastic_depth_prob=drop_path, norm_layer=_NORM, last_channel=_LAST_WIDTH
    )
    _as_in_tensorflow(body)
    backbone = EfficientNetLite(body, name)
    backbone.set_input(_MEAN, _STD)
    return backbone


def _no_squeeze(*_: object, **__: object) -> nn.Module:
    return nn.Identity()


def _as_in_tensorflow(module: nn.Module) -> None:
    """Replace activations and padded convolutions in a module, and in all its parts."""
    for name, part in module.named_children():
        if isinstance(part, nn.SiLU):
            setattr(module, name, nn.ReLU6(inplace=True))
        elif isinstance(part, nn.Conv2d) and part.kernel_size[0] > 1:
            conv = SameConv2d(
                part.in_channels,
                part.out_channels,
                part.kernel_size[0],
                part.stride[0],
                groups=part.groups,
                bias=part.bias is not None,
            )
            conv.weight, conv.bias = part.weight, part.bias
            setattr(module, name, conv)
        else:
            _as_in_tensorflow(part)
