"""The contract between stages and detectors: `Detector`, and the records it takes and returns.

Letters in shape comments: B images, N boxes, S candidates, C channels, D embedding, H W pixels or cells,
K classes, L levels, A anchors, Q queries.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor, nn

from aligndet_cli.backbones import ASSISTANT, Backbone, CompositeBackbone
from aligndet_cli.data.batch import BoxTargets, ImageBatch

# Weight of losses on the maps of a composite's assistant; on the lead's it is 1. Source: CBNet v2.
ASSISTANT_WEIGHT = 0.5


@dataclass(frozen=True)
class Features:
    """Feature maps of an `ImageBatch`.

    Attributes:
        maps: `{"c2": (B, C2, H/4, W/4), ..., "c5": (B, C5, H/32, W/32)}`, only the levels that were asked for.
        sizes_hw: height and width of each image in pixels, without padding.
        batch_hw: height and width of the padded batch in pixels.
        of_assistant: likewise from the assistant of a composite backbone, whose lead has made `maps`; None: there is no
            assistant, or it was not asked for.
    """

    maps: dict[str, Tensor]
    sizes_hw: tuple[tuple[int, int], ...]
    batch_hw: tuple[int, int]
    of_assistant: dict[str, Tensor] | None = None

    def one_by_one(self) -> list["Features"]:
        """Return the features of the assistant, if they are here, and those of the lead."""
        alone = replace(self, of_assistant=None)
        return [alone] if self.of_assistant is None else [replace(alone, maps=self.of_assistant), alone]

    def split(self, count: int) -> tuple["Features", "Features"]:
        """Return the features of the first `count` images, and of the others."""
        first, second = slice(count), slice(count, None)
        return self._of_images(first), self._of_images(second)

    def _of_images(self, images: slice) -> "Features":
        def part(maps: dict[str, Tensor]) -> dict[str, Tensor]:
            return {level: of_level[images] for level, of_level in maps.items()}

        of_assistant = None if self.of_assistant is None else part(self.of_assistant)
        return Features(part(self.maps), self.sizes_hw[images], self.batch_hw, of_assistant)


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
    fresh_modules: tuple[str, ...] = ()
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

    def extract(self, images: ImageBatch, *, with_assistant: bool = False) -> Features:
        """Return the backbone's maps that the detector needs; the other levels are freed at once.

        Args:
            with_assistant: of a composite backbone, also those of its assistant, for training.

        Raises:
            TypeError: it is no batch; a Python program has taken this module for one that takes images.
        """
        if not isinstance(images, ImageBatch):
            raise TypeError(
                f"a detector family takes an ImageBatch, not a {type(images).__name__}; aligndet_cli.load gives a "
                "detector that takes images and torchvision's targets, see docs/python.md"
            )
        height, width = images.pixels.shape[-2:]
        if with_assistant and isinstance(self.backbone, CompositeBackbone):
            maps = self.backbone(images.pixels, with_assistant=True)
            of_assistant = {level: maps[ASSISTANT + level] for level in self.levels}
        else:
            maps, of_assistant = self.backbone(images.pixels), None
        return Features({level: maps[level] for level in self.levels}, images.sizes_hw, (height, width), of_assistant)

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

    def all_candidates(
        self, features: Features, proposals: Sequence[BoxTargets], *, with_losses: bool
    ) -> list[BoxCandidates]:
        """Return the candidates in the features of an assistant, if they are there, and in those of the lead.

        Arguments as in `box_candidates`.
        """
        return [self.box_candidates(one, proposals, with_losses=with_losses) for one in features.one_by_one()]


def weigh_assistant(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum, by name, of the scalar losses in the features of an assistant, times its weight, and of the lead.

    Args:
        losses: as `Features.one_by_one`; of a single backbone they stay as they are.
    """
    if len(losses) == 1:
        return dict(losses[0])
    of_assistant, of_lead = losses
    return {name: ASSISTANT_WEIGHT * of_assistant[name] + loss for name, loss in of_lead.items()}
