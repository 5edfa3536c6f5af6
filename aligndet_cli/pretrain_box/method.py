"""The interface of the methods of `pretrain-box`: checks, the module to train, the verdict, the picture."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aligndet_cli.backbones import Backbone, WeightsTraining, build_backbone, load_backbone_weights
from aligndet_cli.backbones.build import require_single
from aligndet_cli.data.sample import Sample
from aligndet_cli.detectors import Detector, DetectorConfig, settle_neck_norm
from aligndet_cli.errors import ConfigError
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.training.learner import ViewLosses
from aligndet_cli.training.loop import LoopSettings
from aligndet_cli.training.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """Parts that a method builds its module from, beside the settings of the stage.

    Attributes:
        settings: of the run.
        num_classes: K of the boxes, clusters or 1.
        weights: file of the backbone's weights; None leaves them random.
        embedder: file of the weights of a second backbone; None: the same as of the first.
    """

    settings: LoopSettings
    num_classes: int = 1
    weights: Path | None = None
    embedder: Path | None = None


class Pretext(ViewLosses, ABC):
    """Base of the modules that methods train."""

    @property
    @abstractmethod
    def detector(self) -> Detector:
        """The detector whose weights are the result."""

    def layers(self) -> Sequence[Sequence[nn.Module]]:
        """Return the layers of the detector's backbone."""
        return self.detector.backbone.layers()

    @property
    def left_out(self) -> Sequence[str]:
        """Names of further modules of the detector that are not saved: what is trained on clusters, or not at all."""
        return ()

    def extra_parts(self) -> dict[str, dict[str, Tensor]]:
        """Return the state dicts to save that are no part of the fine-tuned detector, by name."""
        return {}


@dataclass(frozen=True)
class ShownView:
    """One view of an image for people: (3, h, w) normalised pixels, (N, 4) xyxy boxes on them, and a line of text."""

    pixels: Tensor
    boxes: Tensor
    text: str


@dataclass(frozen=True)
class Shown:
    """The views of an image, with the same N boxes in each.

    Attributes:
        boxes: (N, 4) xyxy in the pixels of the image.
        kind: what the boxes are.
    """

    boxes: Tensor
    views: Sequence[ShownView]
    kind: str = "proposals"


class Method(ABC):
    """A way to pre-train a detector on images and boxes without labels.

    Attributes:
        idle: settings that have no effect on it, by dotted path.
        trains_norms: a backbone that is not frozen trains its batch norms, too.
    """

    idle: ClassVar[tuple[str, ...]] = ()
    trains_norms: ClassVar[bool] = False

    def check(self, config: PretrainBoxConfig) -> None:
        """Refuse detectors and settings that the method has no use for; called by `prepare`.

        Raises:
            ConfigError: there is one.
        """
        defaults = PretrainBoxConfig.model_validate({"method": config.method})
        for setting in self.idle:
            if attrgetter(setting)(config) != attrgetter(setting)(defaults):
                raise ConfigError(f"{setting}: no effect on --method {config.method}; leave it out")

    def detector_config(self, config: PretrainBoxConfig) -> DetectorConfig:
        """Return the detector to pre-train: AlignDet's neck has no norm (docs/paper.md §5.6) unless asked for."""
        return settle_neck_norm(config.detector, config.neck_norm)

    @abstractmethod
    def build(self, config: PretrainBoxConfig, inputs: Inputs) -> Pretext:
        """Return the module to train, on the CPU, with all weights as at the start."""

    @abstractmethod
    def judge(self, metrics: Path) -> dict[str, Any]:
        """Return `verdict`, one sentence of `explanation`, and the numbers that they rest on, from `metrics.jsonl`."""

    @abstractmethod
    def show(self, config: PretrainBoxConfig, sample: Sample) -> Shown:
        """Return the views of a sample that `build`'s module would train on."""

    def backbone_training(self, before: WeightsTraining) -> WeightsTraining:
        """Return the training of the backbone that fine-tuning starts from; it decides recipe and freezing there."""
        return before

    def describe(self, config: PretrainBoxConfig, recipe: Recipe) -> dict[str, str]:
        """Return effective settings of the method by name, for people."""
        return {}


def require_family(config: PretrainBoxConfig, families: Sequence[str]) -> None:
    """Make sure that the method can train the detector, on a backbone that is no composite.

    Raises:
        ConfigError: it cannot.
    """
    require_single(config.backbone.name, f"--method {config.method}")
    family = config.detector.family
    if family not in families:
        raise ConfigError(
            f"--method {config.method}: is for {', '.join(families)}, not for {family}; give --detector {families[0]}"
        )


def build_seeded_backbone(config: PretrainBoxConfig, weights: Path | None, *, fixes_norms: bool = True) -> Backbone:
    """Seed all random weights that follow, and return the backbone, with the weights of a file if there is one."""
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.backbone)
    load_backbone_weights(backbone, weights)
    if fixes_norms and not config.freeze_backbone and config.backbone.norm_eval == "auto":
        backbone.fix_norms()  # the authors' selfsup_*.py: BN in eval mode, scale and shift fixed
    return backbone
