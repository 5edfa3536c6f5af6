"""One decoded image with its boxes, and the seed of its random draws."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image as decoded, with its boxes in its own pixels.

    Attributes:
        position: place in the endless stream of samples of a run; seeds its augmentation.
        index: position in the `ImageSet`.
        image: (3, H, W) uint8 RGB.
        boxes: (N, 4) xyxy, pixels.
        class_ids: (N,) int64.
        masks: (N, H, W) bool, all False for a box without mask; None if masks are not used.
        pixel_classes: (H, W) uint8, class of every pixel or `NO_CLASS`; None if they are not used.
        skipped: `(file, reason)` of unreadable images that this image replaces.
    """

    position: int
    index: int
    image: Tensor
    boxes: Tensor
    class_ids: Tensor
    masks: Tensor | None = None
    pixel_classes: Tensor | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.image.shape[1], self.image.shape[2]


def mix_seed(*numbers: int) -> int:
    """Return one 63-bit seed from several numbers; different tuples give different seeds (in practice)."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = (mixed ^ (number + 0x632BE59BD9B4E019)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63
