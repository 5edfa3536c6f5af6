"""What follows from the weights that a run starts from: recipe, freezing, norms."""

from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.detectors import DetectorConfig, build_detector
from aligndet_cli.detectors.checkpoint import save_detector
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.finetune.initial import Initial, find_initial
from aligndet_cli.finetune.stage import FinetuneConfig
from aligndet_cli.workspace import Workspace

RESNET = BackboneConfig(name="resnet18")
SMALL = FasterRCNNConfig(neck_channels=32, head_convs=1, head_features=64)


def found(tmp_path: Path, **settings: object) -> Initial:
    return find_initial(FinetuneConfig.model_validate(settings), Workspace(tmp_path))


@pytest.fixture
def moco(tmp_path: Path) -> str:
    state = {f"module.encoder_q.{name}": value for name, value in resnet18().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    return str(tmp_path / "moco.pth")


def test_the_layout_of_the_weights_decides(tmp_path: Path, moco: str) -> None:
    backbone = {"name": "resnet18", "weights": moco}
    of_rcnn = found(tmp_path, init="backbone", backbone=backbone, detector={"family": "faster-rcnn"})
    assert (of_rcnn.recipe.name, of_rcnn.detector.head_norm) == ("moco-v2", "batch")
    assert of_rcnn.has_new_head_norms
    assert (of_rcnn.backbone.frozen_stages, of_rcnn.backbone.norm_eval) == (-1, False)
    asked = found(tmp_path, init="backbone", backbone=backbone, detector={"family": "faster-rcnn"}, recipe="default")
    assert (asked.recipe.name, asked.detector.head_norm) == ("default", "none")
    assert not asked.has_new_head_norms
    kept = {"family": "faster-rcnn", "head_norm": "none"}
    assert found(tmp_path, init="backbone", backbone=backbone, detector=kept).detector.head_norm == "none"
    of_fcos = found(tmp_path, init="backbone", backbone=backbone, detector={"family": "fcos"}, recipe="auto")
    assert (of_fcos.recipe, of_fcos.detector.head_norm) == (FCOSConfig.RECIPE, "group")


@pytest.mark.parametrize(("stage", "head_norm"), [("pretrain-box", "batch"), ("finetune", "none")])
def test_a_detector_brings_its_recipe(tmp_path: Path, stage: str, head_norm: str) -> None:
    """A head that was fine-tuned without norms stays without."""
    config: DetectorConfig = SMALL
    file = tmp_path / "weights.pt"
    model = build_detector(config, build_backbone(RESNET), 1)
    save_detector(file, model, stage=stage, configs=(config, RESNET), recipe="swav")
    initial = found(tmp_path, init=str(file), detector={"family": "faster-rcnn"})
    assert (initial.recipe.name, initial.recipe_origin) == ("swav", f"that of {file}")
    assert initial.recipe.finetune.warmup_steps == 1000
    assert initial.detector.head_norm == head_norm
    assert (
        found(tmp_path, init=str(file), detector={"family": "faster-rcnn"}, recipe="default").recipe.name == "default"
    )


def test_swin_is_never_frozen(tmp_path: Path) -> None:
    initial = found(tmp_path, init="scratch", backbone={"name": "swin_t"}, detector={"family": "mask-rcnn"})
    assert initial.recipe.name == "swin" and initial.backbone.frozen_stages == -1
    assert initial.freeze_origin == "swin recipe, for any weights"
