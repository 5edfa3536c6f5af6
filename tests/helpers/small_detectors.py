"""Detectors small enough to be built in each test."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors import Detector, DetectorConfig
from aligndet_cli.detectors.cascade_rcnn import CascadeMaskRCNNConfig, CascadeRCNNConfig
from aligndet_cli.detectors.checkpoint import DetectorFile, kept_state, write_detector
from aligndet_cli.detectors.detr import DETRConfig
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.detectors.htc import HTCConfig
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.pretrain_box.pretext import BoxPretext
from aligndet_cli.training.recipe import ProjectorRecipe, RecipeName

# One narrow configuration of each family, for the tests that every family has to pass; all else is as by default.
NARROW: dict[str, DetectorConfig] = {
    "cascade-mask-rcnn": CascadeMaskRCNNConfig(neck_channels=32, head_convs=1, head_features=64, mask_convs=1),
    "cascade-rcnn": CascadeRCNNConfig(neck_channels=32, head_convs=1, head_features=64),
    "detr": DETRConfig(hidden_dim=32, num_heads=4, encoder_layers=1, decoder_layers=2, feedforward_dim=64),
    "faster-rcnn": FasterRCNNConfig(neck_channels=32, head_convs=1, head_features=64),
    "fcos": FCOSConfig(neck_channels=64, head_convs=1),
    "htc": HTCConfig(neck_channels=32, head_convs=1, head_features=64, mask_convs=1),
    "mask-rcnn": MaskRCNNConfig(neck_channels=32, head_convs=1, head_features=64, mask_convs=1),
    "retinanet": RetinaNetConfig(neck_channels=32, head_convs=1),
}
# Without dropout, and all anchors and RoIs are used in fine-tuning, so that nothing there is drawn at random.
_NOT_RANDOM = {"dropout": 0.0, "rpn_samples": 9999, "roi_samples": 9999}
_FEW = {"pretext_samples": 128, "pretext_rpn_samples": 128, "score_threshold": 0.05}


def _changed(config: DetectorConfig) -> DetectorConfig:
    changes = {name: value for name, value in (_NOT_RANDOM | _FEW).items() if name in type(config).model_fields}
    return config.model_copy(update=changes)


SMALL: dict[str, DetectorConfig] = {family: _changed(config) for family, config in NARROW.items()}

# For the layouts of other libraries: widths, norms and numbers of layers that differ from family to family.
RCNN = {"neck_channels": 8, "head_features": 12}
CONFIGS: dict[str, DetectorConfig] = {
    "retinanet": RetinaNetConfig(neck_channels=8, head_convs=2, neck_norm="batch"),
    "fcos": FCOSConfig(neck_channels=64, head_convs=1, neck_norm="none"),
    "faster-rcnn": FasterRCNNConfig(**RCNN, head_convs=0, head_fcs=2, neck_norm="none"),
    "mask-rcnn": MaskRCNNConfig(**RCNN, head_convs=3, head_norm="batch", mask_convs=2, neck_norm="batch"),
    "cascade-rcnn": CascadeRCNNConfig(**RCNN, head_convs=0, head_fcs=2, neck_norm="none"),
    "cascade-mask-rcnn": CascadeMaskRCNNConfig(
        **RCNN, head_convs=3, head_norm="batch", mask_convs=2, neck_norm="batch"
    ),
    "htc": HTCConfig(**RCNN, head_convs=2, head_norm="batch", mask_convs=1, neck_norm="none"),
    "detr": DETRConfig(
        num_queries=7, hidden_dim=16, num_heads=8, encoder_layers=1, decoder_layers=2, feedforward_dim=24
    ),
}
CATEGORIES = (Category(3, "cell"), Category(5, "disc"), Category(7, "rod"))


def build(family: str, num_classes: int = 3) -> Detector:
    """With statistics and biases that differ from layer to layer, so that no two tensors are alike."""
    torch.manual_seed(5)
    model = CONFIGS[family].build(build_backbone(BackboneConfig(name="resnet18")), num_classes).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.02)
            elif name.endswith("num_batches_tracked"):
                value.fill_(len(name))
    return model


@functools.cache
def detector_file(family: str) -> DetectorFile:
    model = build(family)
    return DetectorFile(
        stage="finetune",
        detector=CONFIGS[family],
        backbone=BackboneConfig(name="resnet18", weights="none"),
        categories=CATEGORIES,
        resolution=(64, 96),
        state_dict=dict(model.state_dict()),
        extra={},
    )


def save_detector(
    file: Path,
    model: Detector,
    *,
    stage: str,
    configs: tuple[DetectorConfig, BackboneConfig],
    categories: Sequence[Category] = (),
    resolution: tuple[int, int] | None = None,
    recipe: RecipeName | None = None,
) -> None:
    content = DetectorFile(stage, *configs, tuple(categories), resolution, kept_state(model, stage), recipe=recipe)
    write_detector(file, content)


def build_pretext(detector: Detector, config: DetectorConfig, **settings: Any) -> BoxPretext:
    """AlignDet's pretext around a detector, with both tasks and a frozen backbone unless `settings` say otherwise."""
    return BoxPretext(
        detector,
        recipe=config.RECIPE,
        embedding_dim=16,
        projector=ProjectorRecipe(hidden_dim=24),
        temperature=0.5,
        **{"tasks": "both", "freeze_backbone": True, **settings},
    )
