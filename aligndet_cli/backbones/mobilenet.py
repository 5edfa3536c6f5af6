"""MobileNet v2 as a feature extractor, from torchvision's parts.

Source: Sandler et al., CVPR 2018. The maps are mmdetection's `out_indices=(1, 2, 4, 7)`, which the paper's detectors
use: the blocks of 24, 32 and 96 channels and the last convolution of 1,280, whose mean the classifier sees.
"""

from torch import Tensor, nn
from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2
from torchvision.models import mobilenet_v2

from aligndet_cli.backbones.interface import Backbone

# Of torchvision's `features`: 0 is the stem, 1..17 are the blocks, 18 is the last convolution.
LAST_OF_LEVEL = {"c2": 3, "c3": 6, "c4": 13, "c5": 18}


class MobileNetV2(Backbone):
    """Body of a MobileNet v2; its state dict has torchvision's keys without `classifier`.

    c4 is the last map at stride 16, of 96 channels; the 64 channels before it are at the same stride.
    """

    family = "mobilenet"
    classifier = "classifier.1"

    def __init__(self, body: TorchvisionMobileNetV2) -> None:
        super().__init__("mobilenet_v2", {"c2": 24, "c3": 32, "c4": 96, "c5": body.last_channel})
        self.features = body.features

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the maps of the four stages (B, C, H, W) by level; see `Backbone.forward`."""
        maps = {}
        last = self.features[0](pixels)
        for level, stage in zip(self.channels, self.stages(), strict=True):
            for block in stage:
                last = block(last)
            maps[level] = last
        return maps

    def stem(self) -> list[nn.Module]:
        """Return the first convolution with its norm and activation."""
        return [self.features[0]]

    def stages(self) -> list[list[nn.Module]]:
        """Return the blocks up to each level; mmdetection's seven stages end at 1, 3, 6, 10, 13, 16 and 17."""
        starts = (1, *(last + 1 for last in LAST_OF_LEVEL.values()))
        blocks = list(self.features)
        return [blocks[start:end] for start, end in zip(starts, starts[1:], strict=False)]


def build_mobilenet() -> MobileNetV2:
    """Build a MobileNet v2 with torchvision's initial weights (Kaiming normal, fan out; batch norm 1 and 0)."""
    return MobileNetV2(mobilenet_v2(weights=None))
