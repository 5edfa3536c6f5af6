"""What the stages and the detectors say to each other.

Letters in shape comments: B images, N boxes, S candidates, C channels, D embedding, H W pixels or cells,
K classes, L levels, A anchors, Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from aligndet_cli.data.batch import PAD_DIVISOR, BoxTargets, ImageBatch


@dataclass(frozen=True)
class Features:
    """What the backbone makes of an `ImageBatch`.

    Attributes:
        maps: `{"c2": (B, C2, H/4, W/4), ..., "c5": (B, C5, H/32, W/32)}`, the levels the backbone was asked for.
        sizes_hw: as in `ImageBatch`.
        batch_hw: height and width of the padded batch in pixels.
    """

    maps: dict[str, Tensor]
    sizes_hw: tuple[tuple[int, int], ...]
    batch_hw: tuple[int, int]

    def split(self, count: int) -> tuple["Features", "Features"]:
        """Those of the first `count` images, and of the others."""
        maps = {level: (of_level[:count], of_level[count:]) for level, of_level in self.maps.items()}
        first, second = ({level: parts[i] for level, parts in maps.items()} for i in (0, 1))
        return (
            Features(first, self.sizes_hw[:count], self.batch_hw),
            Features(second, self.sizes_hw[count:], self.batch_hw),
        )


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first, in the pixels of the batch image (not padded, not rescaled).

    Attributes:
        boxes: (N, 4) xyxy, clipped to the image.
        scores: (N,) in 0..1.
        class_ids: (N,) int64, 0..K-1.
        masks: (N, M, M) in 0..1, for detectors that predict them: how likely each part of the box, cut into M x M
            equal ones, is part of the object. `paste_mask` turns that into pixels of any resolution.
    """

    boxes: Tensor
    scores: Tensor
    class_ids: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class BoxCandidates:
    """What one view of a batch offers the pretext. S = anchors, points, RoIs or queries that were sampled.

    Attributes:
        features: (S, C) classification-branch features, before the class predictor.
        slots: (S,) int64, which of the predictor's outputs at that place this is (RetinaNet: anchor 0..8 at a
            location; others: 0).
        instance_ids: (S,) int64, id of the matched proposal, unique in the batch; -1 = background.
        losses: scalar box losses of this view by name; empty when not asked for.
    """

    features: Tensor
    slots: Tensor
    instance_ids: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


def extract_features(backbone: nn.Module, images: ImageBatch, levels: Sequence[str]) -> Features:
    """Backbone features of a batch; those of levels that nobody asks for are let go at once."""
    height, width = images.pixels.shape[-2:]
    maps = backbone(images.pixels)
    return Features({level: maps[level] for level in levels}, images.sizes_hw, (height, width))


class Detector(Protocol):
    """A detector family. An `nn.Module` with these members; nothing else is asked of it.

    Attributes:
        backbone: the body only, frozen by the pretext. The FPN belongs to `neck` and is trained.
        class_predictor: last classification layer; restarted by finetune, not trained by the pretext but where the
            recipe `needs_clusters`.
        feature_dim: C of `BoxCandidates.features`.
        num_slots: how many different slots `BoxCandidates.slots` can name.
        class_branch: modules that only the contrastive task trains in the pretext.
        box_branch: modules that only the box losses train in the pretext.
        class_modules: names of the modules with outputs per class, restarted when the classes change.
        fresh_modules: names of the modules that the pretext leaves alone; they start fresh in finetune.
    """

    feature_dim: int
    num_slots: int
    class_modules: tuple[str, ...]
    fresh_modules: tuple[str, ...]

    @property
    def backbone(self) -> nn.Module:
        """The body."""
        ...

    @property
    def class_predictor(self) -> nn.Module:
        """The last classification layer."""
        ...

    @property
    def class_branch(self) -> Sequence[nn.Module]:
        """What only the contrastive task trains."""
        ...

    @property
    def box_branch(self) -> Sequence[nn.Module]:
        """What only the box losses train."""
        ...

    def extract(self, images: ImageBatch) -> Features:
        """Backbone features of a batch."""
        ...

    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Fine-tuning losses by name, already weighted. Images without boxes are negatives."""
        ...

    def detect(self, images: ImageBatch) -> list[Detections]:
        """Detections of each image."""
        ...

    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Sampled candidates of a view with the instance each was assigned, and the box losses if asked for."""
        ...


__all__ = [
    "PAD_DIVISOR",
    "BoxCandidates",
    "BoxTargets",
    "Detections",
    "Detector",
    "Features",
    "ImageBatch",
    "extract_features",
]
