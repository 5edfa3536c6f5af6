"""The interface of the methods of `pretrain-image`: from views of images to losses for a backbone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.training.projector import follow

Losses = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class View:
    """One view of each of B images.

    Attributes:
        pixels: (B, 3, S, S) normalised.
        corners: (B, 4) x1, y1, x2, y2 of its top left and bottom right corner in pixels of the image; x1 > x2 in a
            flipped view, whose left side is the right one of its crop.
    """

    pixels: Tensor
    corners: Tensor


class ImageMethod(nn.Module, ABC):
    """Base of the methods.

    Attributes:
        backbone: what is trained; its last map is used.
        best: value of the loss for perfect predictions, of methods that do not log `chance`.
    """

    backbone: Backbone
    best: ClassVar[float] = -1.0

    @abstractmethod
    def forward(self, views: Sequence[View], class_ids: Tensor | None, *, with_health: bool) -> Losses:
        """Return scalar losses, and scalars that are only logged, by name.

        Args:
            class_ids: (B,) int64, if images have classes.
            with_health: also return the health of the embeddings.
        """

    def copies(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return the trained modules that have a momentum copy, each with that."""
        return ()

    def update_momentum(self, coefficient: float) -> None:
        """Move the momentum copies towards the trained modules, see `follow`."""
        follow(self.copies(), coefficient)


def embed(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Return the mean of the last map of the backbone: (B, 3, H, W) -> (B, C)."""
    last: Tensor = backbone(pixels)["c5"]
    return last.mean(dim=(2, 3))


def places_of(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Return the features of each place of the last map, row after row: (B, 3, H, W) -> (B, h * w, C)."""
    last: Tensor = backbone(pixels)["c5"]
    return last.flatten(2).transpose(1, 2)
