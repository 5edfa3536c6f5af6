"""What makes runs small: half a ResNet-18 of an eighth of its width under the same name, and narrow detectors."""

from typing import Any
from unittest import mock

from torch import nn
from torchvision.models import resnet

from aligndet_cli.backbones import resnet as backbones

SHARE = 8  # 0.3 MB; with fewer than 8 channels, oneDNN writes beyond its buffers on processors without AVX-512
# Settings of each detector, and the same as words of a command.
NARROW: dict[str, tuple[str, ...]] = {
    "retinanet": ("neck_channels=16", "head_convs=1"),
    "fcos": ("neck_channels=64", "head_convs=1"),  # its norms are of 32 groups
    "faster-rcnn": ("neck_channels=16", "head_convs=1", "head_features=32"),
    "mask-rcnn": ("neck_channels=16", "head_convs=1", "head_features=32", "mask_convs=1"),
    # Cascade R-CNN is this one without masks.
    "cascade-mask-rcnn": ("neck_channels=16", "head_convs=1", "head_features=32", "mask_convs=1"),
    "htc": ("neck_channels=16", "head_convs=1", "head_features=32", "mask_convs=1"),
    "detr": ("hidden_dim=32", "num_heads=4", "encoder_layers=1", "decoder_layers=2", "feedforward_dim=64"),
}


def narrow_words(detector: str, *more: str) -> tuple[str, ...]:
    """Return the words that name a detector and make it small, with further settings of it."""
    settings = [word for setting in (*NARROW[detector], *more) for word in ("--set", f"detector.{setting}")]
    return ("--detector", detector, "--backbone", "resnet18", *settings)


class _Narrow(resnet.ResNet):
    @property
    def inplanes(self) -> int:
        return self._inplanes

    @inplanes.setter
    def inplanes(self, value: int) -> None:
        self._inplanes = value if hasattr(self, "_inplanes") else value // SHARE  # the first is the stem's

    def _make_layer(self, block: Any, planes: int, *rest: Any, **more: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // SHARE, *rest, **more)


def build_narrow(name: str, **_: Any) -> resnet.ResNet:
    assert name == "resnet18"
    body = _Narrow(resnet.BasicBlock, [1, 1, 1, 1])
    body.fc = nn.Linear(512 // SHARE, 1000)
    return body


# For a `with` block, or with `start()` for the rest of a process.
narrow_backbones = mock.patch.object(backbones, "get_model", build_narrow)
