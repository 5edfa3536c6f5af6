"""What follows from the weights of a backbone follows from the content of their file alone, whatever it is called."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import models

from aligndet_cli.backbones.layouts import LAYOUTS, NAMINGS, Layout, recognise
from aligndet_cli.finetune.config import FinetuneConfig
from aligndet_cli.finetune.initial import find_initial
from aligndet_cli.workspace import Workspace

# Names and folders that used to decide, or might.
PLACES = (
    "weights.pth",
    "imagenet.pth",
    "densecl_r50_imagenet_200ep.pth",
    "imagenet/weights.pth",
    "IMAGENET1K_V1.pth",
    "moco_v2_800ep.pth.tar",
    "swav/resnet.pt",
    "pixpro.pth",
    "simmim_pretrain.pth",
    "DEFAULT/none.pth",
)
# Recipe of Mask R-CNN by layout; None: by the naming alone.
RECIPES = {
    "MoCo": "moco-v2",
    "PixPro": "pixpro",
    "PixPro, SoCo or like them": "pixpro",
    "SwAV": "swav",
    **dict.fromkeys(
        ("BYOL", "DINO", "DenseCL", "SlotCon", "SoCo", "SoCo's momentum network", "SimSiam"), "self-supervised"
    ),
    "": "self-supervised",  # without a classifier
    **dict.fromkeys(("AlignDet's own", "mmdetection"), "default"),
}
SIMMIM = next(layout for layout in LAYOUTS if layout.name == "SimMIM")
OF_RESNETS = [layout for layout in LAYOUTS if layout is not SIMMIM]


def body_of(name: str) -> dict[str, Tensor]:
    """The tensors of a torchvision model without its classifier, all zero, none of which takes up memory or disk."""
    with torch.device("meta"):
        state = getattr(models, name)().state_dict()
    return {
        key: torch.zeros(()).expand(value.shape) for key, value in state.items() if not key.startswith(("fc.", "head."))
    }


def file_content(layout: Layout, body: dict[str, Tensor]) -> dict[str, object]:
    tensors = {f"{layout.prefix}{name}": value for name, value in body.items()}
    tensors |= {f"{word}0.weight": torch.zeros(1) for word in layout.beside[:1]}
    return {layout.inside[0] if layout.inside else "state_dict": tensors}


def protocol_of(weights: str, workspace: Path, backbone: str = "resnet18") -> tuple[object, ...]:
    """Recipe, freezing and norms of Mask R-CNN, and on what they rest."""
    config = {
        "init": "backbone",
        "detector": {"family": "mask-rcnn"},
        "backbone": {"name": backbone, "weights": weights},
    }
    initial = find_initial(FinetuneConfig.model_validate(config), Workspace(workspace))
    frozen = (initial.backbone.frozen_stages, initial.backbone.norm_eval)
    return initial.recipe.name, frozen, initial.training, initial.detector.head_norm, initial.freeze_origin


@pytest.mark.parametrize("layout", OF_RESNETS, ids=lambda layout: f"{layout.name or 'plain'}-{layout.prefix}")
def test_ten_names_give_one_protocol(layout: Layout, tmp_path: Path) -> None:
    content = file_content(layout, body_of("resnet18"))
    recognised = recognise(content)
    assert recognised is not None and recognised.layout == (layout.name or "torchvision")
    found = set()
    for place in PLACES:
        file = tmp_path / place
        file.parent.mkdir(exist_ok=True)
        torch.save(content, file)
        found.add(protocol_of(str(file), tmp_path / "w"))
    ((recipe, frozen, training, _, _),) = found
    assert recipe == RECIPES[layout.name]
    assert frozen == (-1, False) and not training.is_supervised


def test_simmim_is_told_by_its_mask_token(tmp_path: Path) -> None:
    swin = body_of("swin_t")
    for place in PLACES:
        file = tmp_path / place
        file.parent.mkdir(exist_ok=True)
        torch.save(file_content(Layout("", "encoder.", ("model",), ("encoder.mask_token",)), swin), file)
        assert protocol_of(str(file), tmp_path / "w", "swin_t")[0] == "simmim"


@pytest.mark.parametrize("classifier", ["fc.weight", "classifier.weight", "head.fc.weight"])
@pytest.mark.parametrize("place", PLACES)
def test_a_classifier_beside_the_backbone_means_supervised(classifier: str, place: str, tmp_path: Path) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    for num_classes, frozen in ((1000, (1, True)), (21_841, (1, True)), (128, (-1, False))):
        torch.save({**body_of("resnet18"), classifier: torch.zeros(1, 1).expand(num_classes, 512)}, file)
        assert protocol_of(str(file), tmp_path / "w")[1] == frozen


def test_a_projection_is_no_classifier(tmp_path: Path) -> None:
    """MoCo's `fc` belongs to its method, however many outputs it has."""
    body = {f"module.encoder_q.{name}": value for name, value in body_of("resnet18").items()}
    torch.save({"state_dict": {**body, "module.encoder_q.fc.weight": torch.zeros(1000, 512)}}, tmp_path / "x.pth")
    assert protocol_of(str(tmp_path / "x.pth"), tmp_path / "w")[:2] == ("moco-v2", (-1, False))


@pytest.mark.parametrize("backbone", ["resnet18", "swin_t"])
def test_torchvisions_name_and_torchvisions_file_give_one_protocol(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    file = cache / Path(models.get_model_weights(backbone)["IMAGENET1K_V1"].url).name
    torch.save(getattr(models, backbone)().state_dict(), file)
    moved = tmp_path / "somewhere.pth"
    moved.write_bytes(file.read_bytes())
    names = ("IMAGENET1K_V1", "DEFAULT", str(file), str(moved))
    assert len({protocol_of(name, tmp_path / "w", backbone) for name in names}) == 1
    assert protocol_of("DEFAULT", tmp_path / "w", backbone)[2].is_supervised  # type: ignore[attr-defined]


def test_every_layout_is_here() -> None:
    assert {layout.name for layout in LAYOUTS} == {*RECIPES, "SimMIM"}
    families = {"resnet", "mobilenet", "swin"}
    of_tests_backbones = {"convnext", "efficientnet", "efficientnet-lite"}  # whose recipes no layout decides
    assert {naming.family for naming in NAMINGS} == families | of_tests_backbones
