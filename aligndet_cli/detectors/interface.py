"""The contract between stages and detectors: `Detector`, and the records it takes and returns.

Letters in shape comments: B images, N boxes, S candidates, C channels, D embedding, H W pixels or cells,
K classes, L levels, A anchors, Q queries.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from aligndet_cli.backbones import Backbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch


@dataclass(frozen=True)
class Features:
    """Feature maps of an `ImageBatch`.

    Attributes:
        maps: `{"c2": (B, C2, H/4, W/4), ..., "c5": (B, C5, H/32, W/32)}`, only the levels that were asked for.
        sizes_hw: height and width of each image in pixels, without padding.
        batch_hw: height and width of the padded batch in pixels.
    """

    maps: dict[str, Tensor]
    sizes_hw: tuple[tuple[int, int], ...]
    batch_hw: tuple[int, int]

    def split(self, count: int) -> tuple["Features", "Features"]:
        """Return the features of the first `count` images, and of the others."""
        first, second = slice(count), slice(count, None)
        return self._of_images(first), self._of_images(second)

    def _of_images(self, images: slice) -> "Features":
        maps = {level: of_level[images] for level, of_level in self.maps.items()}
        return Features(maps, self.sizes_hw[images], self.batch_hw)


@dataclass(frozen=True)
class Detections:
    """Objects found in one image, best first, in the pixels of the image as it was in the batch.

    Attributes:
        boxes: (N, 4) xyxy, clipped to the image.
        scores: (N,) in 0..1.
        class_ids: (N,) int64, 0..K-1.
        masks: (N, M, M) probabilities, if the detector predicts masks. Each box is divided into M x M equal parts,
            and a part's value is the probability that it belongs to the object. `paste_mask` makes pixels of them.
    """

    boxes: Tensor
    scores: Tensor
    class_ids: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class BoxCandidates:
    """Sampled candidates (anchors, points, RoIs or queries) of one view of a batch, for the contrastive loss.

    Attributes:
        features: (S, C) classification-branch features, before the class predictor.
        slots: (S,) int64, number of the candidate among those at one location (RetinaNet: anchor 0..8; others: 0).
        instance_ids: (S,) int64, id of the matched proposal, unique in the batch; -1 = background.
        losses: scalar losses of this view by name; empty when not asked for.
        num_per_head: number of candidates of each head, whose candidates stand in this order; empty if all are of one.
    """

    features: Tensor
    slots: Tensor
    instance_ids: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    num_per_head: tuple[int, ...] = ()


class Detector(nn.Module, ABC):
    """A detector family: its parts, and what stages ask of it.

    A family is built from its config, a backbone, and K, the number of classes without background.

    Attributes:
        levels: the backbone's maps that the family needs.
        num_slots: `BoxCandidates.slots` are below this number.
        class_modules: names of the modules with outputs per class, restarted when the classes change.
        fresh_modules: names of the modules that the pretext does not train; fine-tuning starts them afresh.
        class_branch, box_branch: names of the modules that, in the pretext, only the contrastive loss trains, and only
            the box losses. Modules that serve both are in neither.
        backbone: the body without the FPN, frozen by the pretext. The FPN belongs to `neck` and is trained.
        class_predictor: last classification layer, restarted by finetune; the pretext trains it if the recipe
            `needs_clusters`.
        feature_dim: C of `BoxCandidates.features`.
        head_weights: weight in the contrastive loss of each head that has candidates, and a projector, of its own.
        has_objectness: the pretext always trains a score of possible objects that needs no classes.
        trains_objectness: the pretext trains `class_predictor` on "object or not", if not on clusters; for families
            without `has_objectness`.
    """

    levels: ClassVar[tuple[str, ...]]
    num_slots: int = 1
    class_modules: ClassVar[tuple[str, ...]] = ("class_predictor",)
    fresh_modules: ClassVar[tuple[str, ...]] = ()
    class_branch: ClassVar[tuple[str, ...]] = ()
    box_branch: ClassVar[tuple[str, ...]]
    has_objectness: ClassVar[bool] = False
    class_predictor: nn.Module
    trains_objectness: bool = False
    head_weights: tuple[float, ...] = (1.0,)

    def __init__(self, backbone: Backbone, feature_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim

    def extract(self, images: ImageBatch) -> Features:
        """Return the backbone's maps that the detector needs; the other levels are freed at once.

        Raises:
            TypeError: it is no batch; a Python program has taken this module for one that takes images.
        """
        if not isinstance(images, ImageBatch):
            raise TypeError(
                f"a detector family takes an ImageBatch, not a {type(images).__name__}; aligndet_cli.load gives a "
                "detector that takes images and torchvision's targets, see docs/python.md"
            )
        height, width = images.pixels.shape[-2:]
        maps = self.backbone(images.pixels)
        return Features({level: maps[level] for level in self.levels}, images.sizes_hw, (height, width))

    @abstractmethod
    def forward(self, images: ImageBatch, targets: Sequence[BoxTargets]) -> dict[str, Tensor]:
        """Return the scalar losses of fine-tuning by name, already weighted. Images without boxes are negatives."""

    @abstractmethod
    def detect(self, images: ImageBatch) -> list[Detections]:
        """Return the detections of each image, best first."""

    def find_objects(self, images: ImageBatch) -> list[Detections]:
        """Return possible objects of each image, of no class, best first, after pre-training with a score for them.

        Families whose class predictor the pretext trains on "object or not" find them as they detect.
        """
        return self.detect(images)

    @abstractmethod
    def box_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> BoxCandidates:
        """Match candidates with proposals and sample some. The box losses count all that are matched, sampled or not.

        Args:
            features: as from `extract`; they carry no gradient if the backbone is frozen.
            proposals: one per image, with `instance_ids`.
            with_losses: also compute the box losses, and `loss_objectness` for `trains_objectness`.
        """
