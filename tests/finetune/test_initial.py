"""What follows from the weights that a run starts from: recipe, freezing, norms."""

from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18, swin_t

from aligndet_cli.backbones import BackboneConfig, WeightsTraining, build_backbone
from aligndet_cli.data.dataset import Category
from aligndet_cli.detectors import DetectorConfig
from aligndet_cli.detectors.checkpoint import read_detector
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.errors import ConfigError
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.finetune.initial import Initial, find_initial
from aligndet_cli.finetune.transfer import MODULE_NAMES, modules_to_restart, transfer
from aligndet_cli.pretrain_box.methods import METHODS
from aligndet_cli.workspace import Workspace
from helpers.methods import config_of
from helpers.small_detectors import save_detector

CATEGORIES = (Category(1, "a"),)
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
    assert (of_rcnn.backbone.frozen_stages, of_rcnn.backbone.norm_eval) == (-1, False)
    asked = found(tmp_path, init="backbone", backbone=backbone, detector={"family": "faster-rcnn"}, recipe="default")
    assert (asked.recipe.name, asked.detector.head_norm) == ("default", "none")
    kept = {"family": "faster-rcnn", "head_norm": "none"}
    assert found(tmp_path, init="backbone", backbone=backbone, detector=kept).detector.head_norm == "none"
    of_fcos = found(tmp_path, init="backbone", backbone=backbone, detector={"family": "fcos"}, recipe="auto")
    assert (of_fcos.recipe, of_fcos.detector.head_norm) == (FCOSConfig.RECIPE, "group")


@pytest.mark.parametrize(("stage", "head_norm"), [("pretrain-box", "batch"), ("finetune", "none")])
def test_a_detector_brings_its_recipe(tmp_path: Path, stage: str, head_norm: str) -> None:
    """A head that was fine-tuned without norms stays without."""
    config: DetectorConfig = SMALL
    file = tmp_path / "weights.pt"
    model = config.build(build_backbone(RESNET), 1)
    save_detector(file, model, stage=stage, configs=(config, RESNET), recipe="swav")
    initial = found(tmp_path, init=str(file), detector={"family": "faster-rcnn"})
    assert (initial.recipe.name, initial.recipe_origin) == ("swav", f"that of {file}")
    assert initial.recipe.finetune.warmup_steps == 1000
    assert initial.detector.head_norm == head_norm
    assert (
        found(tmp_path, init=str(file), detector={"family": "faster-rcnn"}, recipe="default").recipe.name == "default"
    )


@pytest.mark.parametrize(("method", "family"), [("soco", "faster-rcnn"), ("up-detr", "detr"), ("detreg", "detr")])
def test_the_methods_of_others_are_fine_tuned_by_their_own_recipes(tmp_path: Path, method: str, family: str) -> None:
    config = config_of(method, family)
    detector = METHODS[config.method].detector_config(config)
    recipe = config.recipe_afterwards(config.full_recipe(WeightsTraining()))
    file = tmp_path / "weights.pt"
    model = detector.build(build_backbone(config.backbone), 1)
    save_detector(file, model, stage="pretrain-box", configs=(detector, config.backbone), recipe=recipe)
    initial = found(tmp_path, init=str(file), detector={"family": family})
    assert initial.recipe.name == (method if method != "detreg" else "default")
    # SoCo's decay and warm-up; UP-DETR's 5e-5 for the backbone, which DETR has at 1e-5.
    told = (initial.rates.weight_decay, initial.rates.warmup_steps, initial.rates.backbone_lr_scale)
    assert told == {"soco": (2.5e-5, 1000, 1.0), "up-detr": (1e-4, 500, 0.5), "detreg": (1e-4, 500, 0.1)}[method]


@pytest.mark.parametrize(
    "name", ["moco.pth", "imagenet_ssl/moco.pth", "IMAGENET1K_V1/resnet18-f37072fd.pth", "own.pth"]
)
@pytest.mark.parametrize("is_supervised", [True, False])
def test_no_name_or_folder_of_a_file_decides(tmp_path: Path, moco: str, name: str, is_supervised: bool) -> None:
    file = tmp_path / "weights" / name
    file.parent.mkdir(parents=True)
    content = resnet18().state_dict() if is_supervised else torch.load(moco, weights_only=True)
    torch.save(content, file)
    initial = found(tmp_path, init="backbone", backbone={"name": "resnet18", "weights": str(file)})
    assert initial.training.is_supervised == is_supervised
    assert (initial.backbone.frozen_stages, initial.backbone.norm_eval) == ((1, True) if is_supervised else (-1, False))


def test_swin_is_never_frozen(tmp_path: Path) -> None:
    torch.save(swin_t().state_dict(), tmp_path / "swin.pth")  # with its classifier: supervised
    backbone = {"name": "swin_t", "weights": str(tmp_path / "swin.pth")}
    initial = found(tmp_path, init="backbone", backbone=backbone, detector={"family": "mask-rcnn"})
    assert initial.recipe.name == "swin" and initial.backbone.frozen_stages == -1 and initial.training.is_supervised
    assert initial.freeze_origin == "swin recipe for a swin_t, whatever its weights"


def test_nothing_random_is_frozen(tmp_path: Path) -> None:
    initial = found(tmp_path, init="scratch", detector={"family": "detr"})
    assert (initial.backbone.frozen_stages, initial.backbone.norm_eval) == (-1, False)


def test_a_user_may_know_better_than_the_file(tmp_path: Path, moco: str) -> None:
    backbone = {"name": "resnet18", "weights": moco}
    initial = found(tmp_path, init="backbone", backbone=backbone)
    assert initial.freeze_origin == "not supervised weights: MoCo layout without an ImageNet classifier"
    told = found(tmp_path, init="backbone", backbone={**backbone, "method": "supervised"})
    assert (told.backbone.frozen_stages, told.backbone.norm_eval) == (1, True)
    other = found(tmp_path, init="backbone", backbone={**backbone, "method": "swav"}, detector={"family": "mask-rcnn"})
    assert other.recipe.name == "swav" and other.backbone.frozen_stages == -1
    assert told.freeze_origin == "supervised weights: backbone.method is supervised"


@pytest.mark.parametrize("other", ["mask-rcnn", "faster-rcnn"])
def test_faster_and_mask_rcnn_start_from_each_other(tmp_path: Path, other: str) -> None:
    """The authors' Faster R-CNN starts from the pre-training of their Mask R-CNN."""
    config = MaskRCNNConfig(**SMALL.model_dump(exclude={"family"})) if other == "faster-rcnn" else SMALL
    file = tmp_path / "weights.pt"
    source = config.build(build_backbone(RESNET), 1)
    save_detector(file, source, stage="pretrain-box", configs=(config, RESNET))
    initial = found(tmp_path, init=str(file), detector={"family": other})
    assert (initial.detector.family, initial.detector.head_features, initial.detector.neck_norm) == (other, 64, "batch")
    model = initial.detector.build(build_backbone(RESNET), 1)
    restart = modules_to_restart(model, read_detector(file), CATEGORIES, keep_box_predictor=True)
    report = transfer(model, read_detector(file).state_dict, modules=MODULE_NAMES, restart=restart)
    assert report.share == 1.0 and torch.equal(model.rpn.objectness.weight, source.rpn.objectness.weight)
    save_detector(file, source, stage="finetune", configs=(config, RESNET))
    with pytest.raises(ConfigError, match="change --detector"):
        found(tmp_path, init=str(file), detector={"family": other})


@pytest.mark.parametrize("is_there", [True, False])
def test_runs_of_before_are_told_by_the_file_they_began_with(tmp_path: Path, is_there: bool) -> None:
    """They recorded what was typed and nothing else; the control without pre-training looks at the same file."""
    file = tmp_path / "backbone.pth"
    torch.save(resnet18().state_dict(), file)
    backbone = BackboneConfig(name="resnet18", weights=str(file))
    config = FCOSConfig(neck_channels=64, head_convs=1)
    detector = config.build(build_backbone(RESNET), 1)
    save_detector(tmp_path / "weights.pt", detector, stage="pretrain-box", configs=(config, backbone))
    if not is_there:
        file.unlink()
    initial = found(tmp_path, init=str(tmp_path / "weights.pt"), detector={"family": "fcos"})
    assert initial.training.is_supervised == is_there
    assert ("not recorded" in initial.freeze_origin) == (not is_there)
