"""EfficientNets B0 to B7 and V2 as feature extractors, from torchvision's parts.

Source: Tan & Le, ICML 2019 and 2021. As in our MobileNet v2, c5 is the last convolution, whose mean the classifier
sees.
"""

from itertools import pairwise

from torch import Tensor, nn
from torchvision.models import EfficientNet as TorchvisionEfficientNet
from torchvision.models import get_model

from aligndet_cli.backbones.interface import Backbone, Family


class EfficientNet(Backbone):
    """Body of an EfficientNet; its state dict has torchvision's keys without `classifier`.

    A level is the last map at its stride: of B0 the blocks of 24, 40 and 112 channels, and the last convolution.
    """

    family: Family = "efficientnet"
    classifier = "classifier.1"

    def __init__(self, body: TorchvisionEfficientNet, name: str) -> None:
        # Of `features`, 0 is the stem, the last is the last convolution, and each between is a row of blocks.
        rows = list(body.features)[1:-1]
        halving = [place for place, row in enumerate(rows, start=1) if _halves(row)]
        # The stem is at stride 2, so the rows that halve lead to strides 4, 8, 16 and 32.
        ends = [*halving[1:], len(body.features)]
        widths = [rows[end - 2][-1].out_channels for end in ends[:-1]]
        last_width = body.classifier[-1].in_features
        super().__init__(name, dict(zip(("c2", "c3", "c4", "c5"), [*widths, last_width], strict=True)))
        self.features = body.features
        self._ends = (1, *ends)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the maps of the four stages (B, C, H, W) by level; see `Backbone.forward`."""
        maps = {}
        last = self.features[0](self.own_input(pixels))
        for level, (start, end) in zip(self.channels, pairwise(self._ends), strict=True):
            last = self.features[start:end](last)
            maps[level] = last
        return maps

    def stem(self) -> list[nn.Module]:
        """Return the first convolution with its norm and activation."""
        return [self.features[0]]

    def stages(self) -> list[list[nn.Module]]:
        """Return the rows of blocks up to each level; the last convolution belongs to c5."""
        return [list(self.features[start:end]) for start, end in pairwise(self._ends)]


def _halves(row: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) and module.stride == (2, 2) for module in row.modules())


def build_efficientnet(name: str, *, drop_path: float) -> EfficientNet:
    """Build an EfficientNet with torchvision's initial weights (Kaiming normal, fan out; batch norm 1 and 0).

    `drop_path` is the probability that a block is left out for an image in training; it grows linearly from 0.
    """
    body = get_model(name, weights=None, stochastic_depth_prob=drop_path)
    assert isinstance(body, TorchvisionEfficientNet)
    return EfficientNet(body, name)
