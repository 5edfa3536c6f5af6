"""What a method refuses, which clusters it takes, and how its losses are judged."""

import json
from pathlib import Path
from typing import Any

import pytest

from aligndet_cli.backbones import WeightsTraining
from aligndet_cli.errors import ConfigError
from aligndet_cli.pretrain_box.command import STAGE
from aligndet_cli.pretrain_box.config import PretrainBoxConfig
from aligndet_cli.pretrain_box.health import judge_losses
from aligndet_cli.pretrain_box.methods import METHODS
from aligndet_cli.pretrain_box.recipes import DEFAULTS
from aligndet_cli.workspace import Artifact
from helpers.methods import config_of

IDLE = {
    "projector": {"projector": {"hidden_dim": 8}},
    "projector.start": {"projector": {"start": "kaiming"}},
    "temperature": {"temperature": 0.2},
    "momentum": {"momentum": 0.5},
    "tasks": {"tasks": "regression"},
    "objectness": {"objectness": True},
    "topk": {"topk": 3},
    "limit_boxes": {"limit_boxes": 5},
    "embedder": {"embedder": "embedder.pth"},
    "views.long_side": {"views": {"short_side": (64,), "long_side": 500}},
}


def test_every_method_has_its_defaults() -> None:
    assert METHODS.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("method", ["detreg", "up-detr"])
def test_small_views_are_those_of_selfdet_py(method: str) -> None:
    views = PretrainBoxConfig.model_validate({"method": method, "detector": {"family": "detr"}}).views
    assert set(views.short_side) == {*range(320, 481, 16)} - {384} and views.long_side == 600


@pytest.mark.parametrize("method", [name for name in METHODS if name != "aligndet"])
def test_settings_without_effect_are_refused(method: str) -> None:
    family = "detr" if method in ("detreg", "up-detr") else "faster-rcnn"
    views: dict[str, Any] = {"views": {"short_side": (64,)}}
    METHODS[method].check(config_of(method, family, **views))
    for setting in METHODS[method].idle:
        with pytest.raises(ConfigError, match=f"^{setting}: no effect on --method {method}; leave it out"):
            METHODS[method].check(config_of(method, family, **(views | IDLE[setting])))


@pytest.mark.parametrize(("method", "family"), [("soco", "faster-rcnn"), ("detreg", "detr"), ("up-detr", "detr")])
def test_those_that_would_train_a_lead_alone_refuse_two_linked_backbones(method: str, family: str) -> None:
    said = f"^--method {method}: cb-resnet18 is two of resnet18, give --backbone resnet18$"
    with pytest.raises(ConfigError, match=said):
        METHODS[method].check(config_of(method, family, backbone={"name": "cb-resnet18"}))
    METHODS["classes"].check(config_of("classes", family, backbone={"name": "cb-resnet18"}))


def test_clusters_are_for_classes_and_for_aligndet_in_detr() -> None:
    wanted = {(method, family) for method in METHODS for family in ("detr", "fcos")}
    found = {one for one in wanted if config_of(*one).needs_clusters}
    assert found == {("aligndet", "detr"), ("classes", "detr"), ("classes", "fcos")}


def recipe_after(method: str, family: str, **settings: Any) -> str:
    config = config_of(method, family, **settings)
    return config.recipe_afterwards(config.full_recipe(WeightsTraining()))


def test_fine_tuning_goes_on_with_what_the_authors_of_a_method_publish() -> None:
    assert recipe_after("soco", "faster-rcnn") == "soco" and recipe_after("up-detr", "detr") == "up-detr"
    assert {recipe_after(method, "detr") for method in ("aligndet", "classes", "detreg")} == {"default"}
    # They are for ResNets, and whoever gives a recipe gets it.
    assert recipe_after("soco", "faster-rcnn", backbone={"name": "swin_t"}) == "swin"
    assert recipe_after("soco", "mask-rcnn", recipe="moco-v2") == "moco-v2"
    assert recipe_after("up-detr", "detr", recipe="default") == "default"


def test_a_run_without_a_contrast_is_summed_up_by_its_losses() -> None:
    found = {"verdict": "healthy", "steps": 4, "loss_cls": 0.5, "loss_box_reg": 1.25}
    assert STAGE.headline(Artifact(Path("run"), {"result": found})) == "healthy, losses cls 0.50 box_reg 1.25"
    assert STAGE.headline(Artifact(Path("run"), {"result": {"verdict": "no contrast"}})) == "no contrast"


@pytest.mark.parametrize(
    ("sums", "verdict"), [((4, 2, 1, 1), "healthy"), ((4, 3, 4, 3.99), "not learning"), ((4, 1), "too short")]
)
def test_losses_are_judged_by_their_sum(tmp_path: Path, sums: tuple[float, ...], verdict: str) -> None:
    lines = [{"step": n, "loss_cls": 0.25 * value, "loss_box_reg": 0.75 * value} for n, value in enumerate(sums)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = judge_losses(tmp_path / "metrics.jsonl")
    # The last fifth of four lines is the last one.
    assert found["verdict"] == verdict and found["loss_box_reg"] == pytest.approx(0.75 * sums[-1], abs=1e-4)
    assert found["explanation"].startswith(f"losses (at the start): cls {0.25 * sums[-1]:.2f} (1.00), box_reg ")
