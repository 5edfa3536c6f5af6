"""ResNets as feature extractors, from torchvision's parts.

Source: He et al., CVPR 2016; strides sit in the 3x3 convolutions, as in torchvision and mmdetection's
`style="pytorch"`. Freezing follows mmdetection's `frozen_stages` and `norm_eval`.
"""

from typing import Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model
from torchvision.models import resnet as torchvision_resnet


class ResNet(nn.Module):
    """Body of a ResNet; its state dict has torchvision's keys without `fc`.

    Args:
        body: a whole torchvision ResNet; its classifier is left behind.
        name: what torchvision calls it.

    Attributes:
        name: e.g. `resnet50`.
        channels: width of each map that `forward` returns.
    """

    def __init__(self, body: torchvision_resnet.ResNet, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv1 = body.conv1
        self.bn1 = body.bn1
        self.relu = body.relu
        self.maxpool = body.maxpool
        self.layer1 = body.layer1
        self.layer2 = body.layer2
        self.layer3 = body.layer3
        self.layer4 = body.layer4
        width = body.fc.in_features
        self.channels = {"c2": width // 8, "c3": width // 4, "c4": width // 2, "c5": width}
        self._frozen_stages = -1
        self._norm_eval = False

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Maps of the four stages.

        Args:
            pixels: (B, 3, H, W), ImageNet-normalised RGB.

        Returns:
            `{"c2": (B, C2, H/4, W/4), "c3": (B, C3, H/8, W/8), "c4": (B, C4, H/16, W/16), "c5": (B, C5, H/32, W/32)}`,
            sizes rounded up.
        """
        stem = self.maxpool(self.relu(self.bn1(self.conv1(pixels))))
        c2 = self.layer1(stem)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return {"c2": c2, "c3": c3, "c4": c4, "c5": self.layer4(c4)}

    def freeze(self, frozen_stages: int, *, norm_eval: bool) -> None:
        """Decide what training leaves alone; replaces any earlier decision.

        Args:
            frozen_stages: -1 nothing, 0 the stem, 1..4 the stem and that many stages: no gradients, and batch norm
                uses its running statistics.
            norm_eval: batch norm uses its running statistics in all stages; its scale and shift still train
                where they are not frozen.
        """
        self._frozen_stages = frozen_stages
        self._norm_eval = norm_eval
        self.requires_grad_(True)
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As in `nn.Module`, except that what is frozen stays in eval mode."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        if self._norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _frozen_parts(self) -> list[nn.Module]:
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        stem = [self.conv1, self.bn1] if self._frozen_stages >= 0 else []
        return [*stem, *stages[: max(self._frozen_stages, 0)]]


def build_resnet(name: str) -> ResNet:
    """A ResNet with torchvision's initial weights (Kaiming normal, fan out; batch norm 1 and 0)."""
    body = get_model(name, weights=None)
    assert isinstance(body, torchvision_resnet.ResNet)
    return ResNet(body, name)
