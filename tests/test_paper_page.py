"""The tables of docs/paper.md state the hyper-parameters that the code has."""

import re
from pathlib import Path

import pytest

from aligndet_cli.backbones import BackboneConfig, WeightsTraining
from aligndet_cli.detectors.cascade_rcnn import CascadeMaskRCNNConfig, CascadeRCNNConfig
from aligndet_cli.detectors.detr import DETRConfig
from aligndet_cli.detectors.faster_rcnn import FasterRCNNConfig
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.detectors.mask_rcnn import MaskRCNNConfig
from aligndet_cli.detectors.recipes import recipe_for
from aligndet_cli.detectors.retinanet import RetinaNetConfig
from aligndet_cli.training.recipe import REFERENCE_BATCH, Rates, Recipe, RecipeName
from aligndet_cli.training.schedules import LENGTHS

PAGE = (Path(__file__).parents[1] / "docs" / "paper.md").read_text()
NUMBER = r"\d[\d.,]*(?:e-\d+)?"


def rows_of(section: str) -> list[list[str]]:
    """Return the cells of the table of a section, row by row, without its head."""
    text = PAGE.split(f"\n### {section} ", 1)[1].split("\n#", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def asked(name: RecipeName, backbone: str = "resnet50") -> Recipe:
    config = BackboneConfig.model_validate({"name": backbone})
    return recipe_for(MaskRCNNConfig(), config, WeightsTraining(), asked=name)


# By the first words of a row of §5.1.
RECIPES = {
    "FCOS": FCOSConfig.RECIPE,
    "RetinaNet": RetinaNetConfig.RECIPE,
    "Faster, Mask R-CNN": FasterRCNNConfig.RECIPE,
    "... on MoCo v2 or PixPro": asked("moco-v2"),
    "... on SwAV": asked("swav"),
    "Swin under": asked("swin", "swin_s"),
    "R-CNN on SimMIM": asked("simmim", "swin_b"),
    "DETR": DETRConfig.RECIPE,
}


def stated(cell: str, label: str) -> tuple[str, float, float, int]:
    """Return optimizer, learning rate, weight decay and batch size that a cell states."""
    lr, decay = (float(number) for number in re.findall(NUMBER, cell.replace(",", " "))[:2])
    batch = re.search(r"batch (\d+)", cell) or re.search(r"batch (\d+)", label)
    return "adamw" if "AdamW" in cell else "sgd", lr, decay, int(batch[1]) if batch else REFERENCE_BATCH


def values_of(rates: Rates) -> tuple[str, float, float, int]:
    return rates.optimizer, rates.lr, rates.weight_decay, rates.batch_size


@pytest.mark.parametrize("row", rows_of("5.1"), ids=lambda row: row[0])
def test_rates(row: list[str]) -> None:
    (recipe,) = [recipe for words, recipe in RECIPES.items() if row[0].startswith(words)]
    wanted = [values_of(rates) for rates in (recipe.pretrain, recipe.finetune, recipe.plain)]
    assert [stated(cell, row[0]) for cell in row[1:]] == wanted


def test_every_recipe_has_a_row() -> None:
    assert len(rows_of("5.1")) == len(RECIPES)


def test_schedules() -> None:
    found = {}
    for name, length, drops, _ in rows_of("5.4"):
        if "," not in name:  # the last row names those of image-domain pre-training
            numbers = [int(number.replace(",", "")) for number in re.findall(NUMBER, re.sub(r"\(.*\)", "", drops))]
            found[name.strip("`")] = int(length.split()[0].replace(",", "")), numbers
    lengths = {name: of for name, of in LENGTHS.items() if name not in ("90e", "200e", "300e")}
    wholes = {name: of.steps or of.epochs or 0 for name, of in lengths.items()}
    assert found == {n: (whole, [round(d * whole) for d in LENGTHS[n].drops]) for n, whole in wholes.items()}


def test_proposals_and_projectors() -> None:
    assert [FCOSConfig.RECIPE.topk, FasterRCNNConfig.RECIPE.topk] == [70, 70]  # §2.6
    assert [RetinaNetConfig.RECIPE.topk, DETRConfig.RECIPE.topk] == [50, 50]
    rcnn = (FasterRCNNConfig, MaskRCNNConfig, CascadeRCNNConfig, CascadeMaskRCNNConfig)
    configs = ((RetinaNetConfig, FCOSConfig), rcnn, (DETRConfig,))
    for (_, width, start), families in zip(rows_of("4.7"), configs, strict=True):
        for config in families:
            projector = config.RECIPE.projector
            assert (projector.hidden_dim, projector.start == "torch") == (int(width), "nn.Linear" in start)
