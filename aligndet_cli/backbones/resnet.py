"""ResNets as feature extractors, from torchvision's parts.

Source: He et al., CVPR 2016; strides sit in the 3x3 convolutions, as in torchvision and mmdetection's
`style="pytorch"`, unless asked for in the 1x1 ones (`style="caffe"`, detectron2's `STRIDE_IN_1X1`). Freezing follows
mmdetection's `frozen_stages` and `norm_eval`.
"""

from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models import resnet as torchvision_resnet

from aligndet_cli.backbones.interface import Backbone


class ResNet(Backbone):
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

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the maps of the four stages (B, C, H, W) by level; see `Backbone.forward`."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(pixels))))
        c2 = self.layer1(stem)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return {"c2": c2, "c3": c3, "c4": c4, "c5": self.layer4(c4)}

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
