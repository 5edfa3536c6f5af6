"""Which images are trained on, and how many parameters."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from aligndet_cli.backbones import BackboneConfig, build_backbone
from aligndet_cli.detectors import settle_neck_norm
from aligndet_cli.detectors.fcos import FCOSConfig
from aligndet_cli.errors import ConfigError, WeightsError
from aligndet_cli.pretrain_box.pretext import BoxPretext
from aligndet_cli.pretrain_box.stage import Plan, PretrainBoxConfig, describe, prepare
from aligndet_cli.training.recipe import ProjectorRecipe
from aligndet_cli.workspace import Workspace


@pytest.fixture
def workspace(chain: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(chain / "proposals", tmp_path / "w" / "proposals")
    shutil.copy(chain / "workspace.json", tmp_path / "w")
    return Workspace(tmp_path / "w")


def plan_of(workspace: Workspace, **settings: object) -> Plan:
    return prepare(
        PretrainBoxConfig.model_validate({"backbone": {"name": "resnet18", "weights": "none"}, **settings}), workspace
    )


def test_images_are_drawn_until_they_have_enough_boxes(workspace: Workspace) -> None:
    whole = plan_of(workspace, topk=3)
    counts = {index: len(whole.boxes.boxes_and_classes(index)[0]) for index in whole.indices}
    assert whole.boxes.counts(whole.indices).tolist() == list(counts.values()) and max(counts.values()) == 3
    limit = sum(counts.values()) // 2
    drawn = plan_of(workspace, topk=3, limit_boxes=limit)
    total = sum(counts[index] for index in drawn.indices)
    # The last image that is drawn may have more than are still needed.
    assert (
        limit <= total < limit + 3 and drawn.indices == sorted(set(drawn.indices)) and set(drawn.indices) < set(counts)
    )
    assert describe(drawn)["images"].startswith(f"{len(drawn.indices)} with {total} proposals (--limit-boxes), of ")
    assert drawn.settings.schedule.num_steps == 12 * -(-len(drawn.indices) // 16)
    assert plan_of(workspace, topk=3, limit_boxes=limit).indices == drawn.indices
    others = [plan_of(workspace, topk=3, limit_boxes=limit, seed=seed).indices for seed in (1, 2, 3)]
    assert any(other != drawn.indices for other in others)
    assert plan_of(workspace, topk=3, limit_boxes=sum(counts.values())).indices == whole.indices
    with pytest.raises(ConfigError, match=r"--limit-boxes 9999: the \d+ images have only \d+ proposals"):
        plan_of(workspace, limit_boxes=9999)


@pytest.mark.parametrize(("family", "topk"), [("retinanet", 50), ("fcos", 70), ("faster-rcnn", 70), ("mask-rcnn", 70)])
def test_proposals_are_capped_by_the_recipe_and_by_what_is_asked_for(
    workspace: Workspace, family: str, topk: int
) -> None:
    capped = plan_of(workspace, detector={"family": family})
    assert capped.boxes.topk == topk
    assert describe(capped)["proposals per image"] == f"best {topk} ({family} recipe)"
    assert capped.config.from_recipe()["topk"] == topk  # what `config show` prints
    everything = plan_of(workspace, detector={"family": family}, topk=100_000)
    rows = everything.boxes.rows[everything.indices]
    assert everything.boxes.counts(everything.indices).tolist() == everything.boxes.store.counts[rows].tolist()
    assert describe(everything)["proposals per image"] == "all (given)"


def test_a_method_without_proposals_tells_of_none(workspace: Workspace) -> None:
    told = describe(plan_of(workspace, method="up-detr", detector={"family": "detr"}))
    assert "proposals per image" not in told and told["patches"].startswith("10 an image")


def test_messages_about_the_embedder_name_it(workspace: Workspace, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.pth")
    with pytest.raises(WeightsError, match=rf"^embedder: backbone weights {gone}: no such file"):
        plan_of(workspace, method="detreg", detector={"family": "detr"}, embedder=gone)


def test_recipe_is_shown_and_refused(workspace: Workspace) -> None:
    assert describe(plan_of(workspace))["recipe"] == "default (by detector, backbone and its weights)"
    asked = plan_of(workspace, detector={"family": "faster-rcnn"}, recipe="swav")
    assert describe(asked)["recipe"] == "swav (given)" and asked.recipe.name == "swav"
    with pytest.raises(ConfigError, match="--recipe swav: is for faster-rcnn, mask-rcnn, .*not for retinanet"):
        plan_of(workspace, recipe="swav")


def test_a_frozen_backbone_recomputes_nothing(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="backbone.recompute: no effect on a frozen backbone"):
        plan_of(workspace, backbone={"name": "swin_t", "recompute": True})


def test_objectness_where_it_has_no_effect(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"--objectness: no effect, faster-rcnn trains such a score in any case"):
        plan_of(workspace, detector={"family": "faster-rcnn"}, objectness=True)
    with pytest.raises(ConfigError, match="--objectness: no effect with --tasks contrastive"):
        plan_of(workspace, tasks="contrastive", objectness=True)
    assert plan_of(workspace, objectness=True).config.objectness


def trained(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def test_parameters_of_fcos_on_resnet50_are_those_of_the_paper() -> None:
    """Table 12: 23.23 M in the backbone, 8.79 M in the rest and 32.02 M together.

    The paper counts as mmdetection does: 80 classes, no norm in the neck, and norms of the backbone fixed.
    """
    config = FCOSConfig()
    backbone = BackboneConfig(frozen_stages=1, norm_eval=True)
    with torch.device("meta"):
        plain = settle_neck_norm(config, "none").build(build_backbone(backbone), 80)
        finetuned = settle_neck_norm(config, "batch").build(build_backbone(backbone), 80)
        pretext = BoxPretext(
            settle_neck_norm(config, "none").build(build_backbone(BackboneConfig()), 1),
            recipe=config.RECIPE,
            embedding_dim=256,
            projector=ProjectorRecipe(),
            temperature=0.5,
            tasks="both",
            freeze_backbone=True,
        )
    norms = trained(*(module for module in plain.backbone.modules() if isinstance(module, nn.BatchNorm2d)))
    body = trained(plain.backbone) - norms
    rest = trained(plain) - trained(plain.backbone)
    assert [round(number / 1e6, 2) for number in (body, rest, body + rest)] == [23.23, 8.79, 32.02]
    # What we train: in pre-training a projector (2 x 256 x 257) takes the place of the 80 classes (80 x (9 x 256 + 1)),
    # in fine-tuning the norms too: of the backbone, and a scale for each of the neck's 8 x 256 channels.
    assert trained(pretext) == rest - 80 * 2305 + 2 * 256 * 257 == 8_734_474
    assert trained(finetuned) == body + norms + rest + 8 * 256 == 32_072_026
