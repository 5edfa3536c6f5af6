"""The interface of all backbones, and the freezing that all families share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm

from aligndet_cli.data.transforms import MEAN, STD

Family = Literal["resnet", "mobilenet", "swin", "convnext", "efficientnet", "efficientnet-lite", "timm", "vit"]
STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
COMPOSITE = "cb-"  # before the name of a backbone: two of it
ASSISTANT = "assistant_"  # before the levels of the maps of a composite's assistant, as in `assistant_c2`


class Backbone(nn.Module, ABC):
    """Body of an image classifier, whose parts keep torchvision's names if it is there.

    All take images that are normalised with ImageNet's mean and deviation, which batches are. A network that was
    trained with others has them as buffers, `mean` and `std`, and changes the images itself; so they are in its state
    dict, and in every file of a detector.

    Attributes:
        name: torchvision's name, e.g. `resnet50`.
        channels: number of channels of each map that `forward` returns.
        family: recipes and weight layouts depend on it.
        classifier: torchvision's name of the classification layer, which is left out.
        additions: name prefixes of tensors that torchvision's network lacks; they start fresh if a weights file lacks
            them too.
    """

    family: Family
    classifier: str
    additions: ClassVar[tuple[str, ...]] = ()
    mean: Tensor | None
    std: Tensor | None

    def __init__(self, name: str, channels: dict[str, int]) -> None:
        super().__init__()
        self.name = name
        self.channels = channels
        self._levels = tuple(channels)
        self._frozen_stages = -1
        self._norm_eval = False
        self.register_buffer("mean", None)
        self.register_buffer("std", None)

    def set_input(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and deviation that the network was trained with, of RGB in 0..1; ImageNet's need nothing."""
        if (tuple(mean), tuple(std)) != (MEAN, STD):
            self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def own_input(self, pixels: Tensor) -> Tensor:
        """Return images (B, 3, H, W), ImageNet-normalised RGB, with the mean and deviation of the network."""
        if self.mean is None or self.std is None:
            return pixels
        mean, std = pixels.new_tensor(MEAN), pixels.new_tensor(STD)
        scale, shift = std / self.std, (mean - self.mean) / self.std
        return torch.addcmul(shift.view(-1, 1, 1), pixels, scale.view(-1, 1, 1))

    @abstractmethod
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the maps of the four stages of images (B, 3, H, W), ImageNet-normalised RGB; sizes are rounded up.

        `{"c2": (B, C2, H/4, W/4), "c3": (B, C3, H/8, W/8), "c4": (B, C4, H/16, W/16), "c5": (B, C5, H/32, W/32)}`
        """

    @abstractmethod
    def stem(self) -> list[nn.Module]:
        """Return the modules before the first stage."""

    @abstractmethod
    def stages(self) -> list[list[nn.Module]]:
        """Return the modules of each of the four stages; the last stage makes c5."""

    def only_for(self, level: str) -> list[nn.Module]:
        """Return the modules that only this level needs."""
        return []

    def layers(self) -> list[list[nn.Module]]:
        """Return the modules whose learning rates `training.layer_decay` sets apart, the first layer first.

        What is in none has the full rate, like the rest of a detector.
        """
        return [self.stem(), *self.stages()]

    def use_levels(self, levels: Sequence[str]) -> dict[str, int]:
        """Stop training modules that only other levels need, and return the number of channels of these levels."""
        self._levels = tuple(levels)
        for part in self._idle_parts():
            part.requires_grad_(False)
        return {level: self.channels[level] for level in levels}

    def freeze(self, frozen_stages: int, *, norm_eval: bool) -> None:
        """Freeze stages and norms; replaces any earlier choice.

        Args:
            frozen_stages: -1 nothing, 0 the stem, 1..4 the stem and that many stages. Frozen stages have no gradients
                and no drop path, and their batch norm uses its running statistics.
            norm_eval: batch norm uses its running statistics in all stages; its scale and shift still train unless
                frozen. Layer norm has no statistics, so nothing changes for it.
        """
        self._frozen_stages = frozen_stages
        self._norm_eval = norm_eval
        self.requires_grad_(True)
        for part in self._frozen_parts() + self._idle_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def fix_norms(self) -> None:
        """Let batch norms use their running statistics and keep their scale and shift, whatever stages train."""
        self._norm_eval = True
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as `nn.Module` does, but keep frozen modules in eval mode."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        if self._norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def torchvision_state(self) -> dict[str, Tensor]:
        """Return the state dict without our additions: torchvision's network has all of its keys."""
        own = (*self.additions, "mean", "std")
        return {name: value for name, value in self.state_dict().items() if not name.startswith(own)}

    def _frozen_parts(self) -> list[nn.Module]:
        frozen = self.stages()[: max(self._frozen_stages, 0)]
        stem = self.stem() if self._frozen_stages >= 0 else []
        return [*stem, *(part for stage in frozen for part in stage)]

    def _idle_parts(self) -> list[nn.Module]:
        return [part for level in self.channels if level not in self._levels for part in self.only_for(level)]


class StagedBackbone(Backbone):
    """A backbone whose stages can be run one by one, so that another can be linked with it."""

    @abstractmethod
    def begin(self, pixels: Tensor) -> Tensor:
        """Return the input of the first stage (B, C, H/4, W/4) from images as in `forward`."""

    @abstractmethod
    def run_stage(self, place: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Run the stage of level `place` (0 for c2) on its input (B, C, H, W).

        Returns:
            Its map, and the input of the next stage.
        """

    @abstractmethod
    def input_width(self, place: int) -> int:
        """Return the number of channels that go into the stage of level `place`."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the maps of the four stages (B, C, H, W) by level; see `Backbone.forward`."""
        hidden, maps = self.begin(pixels), {}
        for place, level in enumerate(self.channels):
            maps[level], hidden = self.run_stage(place, hidden)
        return maps


def in_threes(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Return blocks in layers of three, as ConvNeXt's authors take those of its third stage."""
    return [list(blocks[first : first + 3]) for first in range(0, len(blocks), 3)]


def pad_to_strides(pixels: Tensor) -> Tensor:
    """Pad images (B, 3, H, W) with zeros at the bottom and the right, up to multiples of the largest stride.

    For networks that cut their input into whole patches, and would lose a part of other sizes.
    """
    height, width = pixels.shape[-2:]
    largest = max(STRIDES.values())
    if height % largest == 0 and width % largest == 0:
        return pixels
    return pad(pixels, (0, -width % largest, 0, -height % largest))


def crop_maps(maps: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    """Cut the maps of padded images to the size that images (B, 3, H, W) need, rounded up."""
    height, width = pixels.shape[-2:]
    return {
        level: one[..., : -(-height // STRIDES[level]), : -(-width // STRIDES[level])] for level, one in maps.items()
    }
