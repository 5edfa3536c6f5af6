"""ResNets as feature extractors, from torchvision's parts.

Source: He et al., CVPR 2016; strides sit in the 3x3 convolutions, as in torchvision and mmdetection's
`style="pytorch"`, unless asked for in the 1x1 ones (`style="caffe"`, detectron2's `STRIDE_IN_1X1`). Freezing follows
mmdetection's `frozen_stages` and `norm_eval`.
"""

from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models import resnet as torchvision_resnet

from aligndet_cli.backbones.interface import StagedBackbone


class ResNet(StagedBackbone):
    """Body of a ResNet; its state dict has torchvision's keys without `fc`."""

    family = "resnet"
    classifier = "fc"

    def __init__(self, body: torchvision_resnet.ResNet, name: str) -> None:
        width = body.fc.in_features
        super().__init__(name, {"c2": width // 8, "c3": width // 4, "c4": width // 2, "c5": width})
        self.conv1 = body.conv1
        self.bn1 = body.bn1
        self.relu = body.relu
        self.maxpool = body.maxpool
        self.layer1 = body.layer1
        self.layer2 = body.layer2
        self.layer3 = body.layer3
        self.layer4 = body.layer4

    def begin(self, pixels: Tensor) -> Tensor:
        """Return the pooled maps of the stem (B, 64, H/4, W/4)."""
        stem: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(pixels))))
        return stem

    def run_stage(self, place: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of `layer1` to `layer4` (B, C, H, W), which is the input of the next."""
        output: Tensor = (self.layer1, self.layer2, self.layer3, self.layer4)[place](hidden)
        return output, output

    def input_width(self, place: int) -> int:
        """Return the width of the stem or of the stage before."""
        return list(self.channels.values())[place - 1] if place else self.bn1.num_features

    def stem(self) -> list[nn.Module]:
        """Return the first convolution and its norm."""
        return [self.conv1, self.bn1]

    def stages(self) -> list[list[nn.Module]]:
        """Return `layer1` to `layer4`."""
        return [[self.layer1], [self.layer2], [self.layer3], [self.layer4]]


def build_resnet(name: str, *, stride_in_1x1: bool = False) -> ResNet:
    """Build a ResNet with torchvision's initial weights (Kaiming normal, fan out; batch norm 1 and 0).

    With `stride_in_1x1`, bottlenecks stride in their first 1x1 convolution; all shapes of weights stay the same.
    """
    body = get_model(name, weights=None)
    assert isinstance(body, torchvision_resnet.ResNet)
    for block in body.modules():
        if stride_in_1x1 and isinstance(block, torchvision_resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return ResNet(body, name)
