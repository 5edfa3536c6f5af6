from pathlib import Path

import pytest

from aligndet_cli.config import STAGES, FileOr
from aligndet_cli.errors import ConfigError
from aligndet_cli.stage import find_stage
from aligndet_cli.tools.study.plan import _TOLD_APART, StageRun, plan_runs
from aligndet_cli.tools.study.spec import load_study
from aligndet_cli.workspace import Workspace
from helpers.studies import TWO_STARTS, values_of, write_study


def planned(folder: Path, text: str, head: str = 'data = "toy"\ndetectors = ["retinanet"]') -> dict[str, StageRun]:
    study = load_study(write_study(folder, text, head=head))
    return {run.key: run for run in plan_runs(study, Workspace(folder / "ws"))}


def test_cross_product_with_shared_pretraining(tmp_path: Path) -> None:
    head = 'data = "toy"\ndetectors = ["retinanet", "fcos"]\nfractions = [5, 100]\nfolds = [1, 2]\nseeds = [0, 3]'
    runs = planned(tmp_path, TWO_STARTS, head)
    # 2 detectors x 2 seeds x (2 folds of 5 % + all images) x 2 starts = 24 fine-tunings, as many evaluations;
    # proposals once, and one pre-training per detector.
    counts = {stage: sum(run.stage == stage for run in runs.values()) for stage in ("finetune", "evaluate")}
    assert counts == {"finetune": 24, "evaluate": 24}
    assert [key for key in runs if key.startswith(("proposals", "pretrain"))] == [
        "proposals/proposals",
        "pretrain-box/retinanet",
        "pretrain-box/fcos",
    ]
    tuned = runs["finetune/fcos-aligndet-f2-p5-s3"]
    values = values_of(tuned)
    assert values["init"] == str((tmp_path / "ws" / "pretrain-box" / "fcos" / "weights.pt").resolve())
    assert (values["fraction"], values["fold"], values["seed"], values["label"]) == (5, 2, 3, "AlignDet")
    assert tuned.needs == ("pretrain-box/fcos",)
    assert "fold" not in values_of(runs["finetune/fcos-from-scratch-s0"])
    assert values_of(runs["evaluate/fcos-aligndet-f2-p5-s3"])["run"] == tuned.name
    order = list(runs)
    assert all(order.index(need) < order.index(key) for key, run in runs.items() for need in run.needs)


def test_settings_reach_the_stages_that_have_them(tmp_path: Path) -> None:
    text = """
[settings.common]
"backbone.name" = "resnet18"
"backbone.weights" = "DEFAULT"
"detector.head_norm" = "group"
"training.lr" = 0.5
[settings.finetune]
min_match = 0.5
"training.steps" = 7
[detector.detr.finetune]
"training.steps" = 9
""" + TWO_STARTS.replace('label = "AlignDet"', 'label = "AlignDet"\nfinetune = { training.lr = 0.1 }')
    runs = planned(tmp_path, text, 'data = "toy"\ndetectors = ["retinanet", "detr"]')
    scratch, ours = (values_of(runs[f"finetune/retinanet-{slug}-s0"]) for slug in ("from-scratch", "aligndet"))
    assert (scratch["training.lr"], ours["training.lr"]) == (0.5, 0.1)
    assert (scratch["training.steps"], ours["training.steps"]) == (7, 7)
    # Scratch loads nothing: general settings about loading would be refused there.
    assert "min_match" not in scratch and "backbone.weights" not in scratch
    assert (ours["min_match"], ours["backbone.weights"]) == (0.5, "DEFAULT")
    detr = values_of(runs["finetune/detr-aligndet-s0"])
    assert detr["training.steps"] == 9 and "detector.head_norm" not in detr  # not one of DETR's settings
    assert "training.lr" not in values_of(runs["proposals/proposals"])
    assert values_of(runs["pretrain-box/detr"])["clusters"] == "clusters"  # only DETR needs them
    assert runs["pretrain-box/detr"].needs == ("proposals/proposals", "cluster/clusters")
    assert "clusters" not in values_of(runs["pretrain-box/retinanet"])


def test_methods_have_the_clusters_that_they_train_on(tmp_path: Path) -> None:
    text = "".join(
        f"""
[[starts]]
label = "{method}"
detectors = {detectors}
pretrain-box = {{ method = "{method}" }}
"""
        for method, detectors in (("classes", '["retinanet"]'), ("detreg", '["detr"]'), ("aligndet", '["detr"]'))
    )
    runs = planned(tmp_path, text, 'data = "toy"\ndetectors = ["retinanet", "detr"]')
    needs = {run.name: run.needs for run in runs.values() if run.stage == "pretrain-box"}
    both = ("proposals/proposals", "cluster/clusters")
    assert needs == {"retinanet-classes": both, "detr-detreg": both[:1], "detr-aligndet": both}


def test_equal_settings_share_one_run(tmp_path: Path) -> None:
    text = """
[settings.pretrain-image]
[settings.common]
"backbone.name" = "resnet18"
[[starts]]
label = "backbone only"
init = "backbone"
[[starts]]
label = "fewer boxes"
proposals = { max_per_image = 5 }
[[starts]]
label = "neck of fewer boxes"
proposals = { max_per_image = 5 }
finetune = { load_modules = ["backbone", "neck"] }
[[starts]]
label = "AlignDet"
[[starts]]
label = "one seed"
pretrain-box = { tasks = "regression" }
seeds = [1]
"""
    head = 'data = "toy"\nimage_data = "crops"\ndetectors = ["retinanet"]\nseeds = [0, 1]\npretrain_per_seed = true'
    runs = planned(tmp_path, text, head)
    assert [key for key in runs if not key.startswith(("finetune", "evaluate"))] == [
        "pretrain-image/backbone",
        "proposals/proposals-fewer-boxes",
        "pretrain-box/retinanet-fewer-boxes-s0",
        "proposals/proposals",
        "pretrain-box/retinanet-s0",
        "pretrain-box/retinanet-fewer-boxes-s1",
        "pretrain-box/retinanet-s1",
        "pretrain-box/retinanet-one-seed-s1",
    ]
    weights = str((tmp_path / "ws" / "pretrain-image" / "backbone" / "weights.pt").resolve())
    plain = runs["finetune/retinanet-backbone-only-s0"]
    assert values_of(plain)["backbone.weights"] == weights and plain.needs == ("pretrain-image/backbone",)
    assert runs["finetune/retinanet-neck-of-fewer-boxes-s1"].needs == ("pretrain-box/retinanet-fewer-boxes-s1",)
    assert values_of(runs["pretrain-box/retinanet-one-seed-s1"])["seed"] == 1
    assert values_of(runs["pretrain-image/backbone"])["data.root"] == str(Path("crops").resolve())
    assert "finetune/retinanet-one-seed-s0" not in runs


@pytest.mark.parametrize("stage", STAGES)
def test_other_weights_are_another_run(stage: str) -> None:
    """What is not hashed as a setting, since its content is, still tells the runs of a study apart."""
    config = find_stage(stage).steps().config
    files = [name for name, field in config.model_fields.items() if any(isinstance(m, FileOr) for m in field.metadata)]
    assert {name for name in files if name in config.UNHASHED} <= set(_TOLD_APART)


ROUNDS = """
[[starts]]
label = "one round"
[[starts]]
label = "two rounds"
proposals = { from_run = "one round" }
[[starts]]
label = "three rounds"
proposals = { from_run = "two rounds" }
"""


def test_a_second_round_needs_the_pretraining_of_the_first(tmp_path: Path) -> None:
    head = 'data = "toy"\ndetectors = ["faster-rcnn", "mask-rcnn"]'
    runs = planned(tmp_path, ROUNDS, head)
    for detector in ("faster-rcnn", "mask-rcnn"):
        second = runs[f"proposals/proposals-{detector}-two-rounds"]
        assert second.needs == (f"pretrain-box/{detector}",) and values_of(second)["from_run"] == detector
        assert runs[f"pretrain-box/{detector}-two-rounds"].needs == (second.key,)
        third = runs[f"proposals/proposals-{detector}-three-rounds"]
        assert third.needs == (f"pretrain-box/{detector}-two-rounds",)
    order = list(runs)
    assert all(order.index(need) < order.index(key) for key, run in runs.items() for need in run.needs)
    assert sum(key.startswith("proposals/") for key in runs) == 1 + 2 * 2


def test_a_round_may_start_from_a_run_of_the_workspace(tmp_path: Path) -> None:
    (tmp_path / "ws" / "pretrain-box" / "mine").mkdir(parents=True)
    runs = planned(tmp_path, ROUNDS.replace('"one round" }', '"mine" }').split('[[starts]]\nlabel = "three')[0])
    second = runs["proposals/proposals-two-rounds"]
    assert second.needs == () and values_of(second)["from_run"] == "mine"


def test_clusters_leave_boxes_for_a_second_round_where_these_are_of_no_class(tmp_path: Path) -> None:
    head = 'data = "toy"\ndetectors = ["cascade-rcnn"]'
    by_clusters = ROUNDS.replace('"one round"\n[', '"one round"\npretrain-box = {method = "classes"}\n[')
    assert "proposals/proposals-cascade-rcnn-two-rounds" in planned(tmp_path, by_clusters, head)


@pytest.mark.parametrize("detector", ["retinanet", "fcos", "detr"])
def test_a_second_round_needs_a_score_of_objects(tmp_path: Path, detector: str) -> None:
    head = f'data = "toy"\ndetectors = ["{detector}"]'
    with pytest.raises(ConfigError, match=f"{detector} of 'one round' learns no score"):
        planned(tmp_path, ROUNDS, head)
    runs = planned(tmp_path, "[settings.pretrain-box]\nobjectness = true\n" + ROUNDS, head)
    assert f"proposals/proposals-{detector}-three-rounds" in runs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ROUNDS.replace('from_run = "one round"', 'from_run = "two rounds"'), "set this in a start below it"),
        (ROUNDS.replace('from_run = "one round"', 'from_run = "three rounds"'), "set this in a start below it"),
        ('[settings.proposals]\nfrom_run = "one round"' + ROUNDS, "set this in a start below it"),
        (ROUNDS.replace('"one round"\n[', '"one round"\ninit = "backbone"\n['), "has no pre-training"),
        (ROUNDS.replace('"one round" }', '"one ruond" }'), "no start and no run of the workspace.*'one round'"),
        (ROUNDS.replace("proposals", 'init = "backbone"\nproposals', 1), "proposals: no effect with init"),
        (ROUNDS.replace('"one round"\n[', '"one round"\npretrain-box = {tasks = "contrastive"}\n['), "are random"),
        (ROUNDS.replace('"one round"\n[', '"one round"\npretrain-box = {method = "soco"}\n['), "by soco, which leaves"),
        (ROUNDS.replace('"one round"\n[', '"one round"\npretrain-box = {method = "classes"}\n['), "by classes, which"),
    ],
)
def test_rounds_that_cannot_be_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        planned(tmp_path, text, 'data = "toy"\ndetectors = ["faster-rcnn"]')


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            '[settings.common]\n"backbone.namx" = 1',
            "no stage has 'backbone.namx'; did you mean 'backbone.na",
        ),
        ("[settings.finetune]\nfold = 3", "settings.finetune.fold: the study sets this itself"),
        ("[settings.common]\nseed = 3", "settings.common.seed: the study sets this itself"),
        ('[settings.finetune]\n"training.stepz" = 3', "training.stepz: unknown key (from settings.finetune); did you"),
        ('[settings.evaluate]\nmetric = "x"', "metric: 'x' is not a choice (from settings.evaluate)"),
        ('[settings.pretrain-box]\nmethod = "soco"', "--method soco: is for faster-rcnn, mask-rcnn, not for retinanet"),
        (
            '[settings.pretrain-box]\nmethod = "classes"\ntemperature = 0.2',
            "temperature: no effect on --method classes; leave it out",
        ),
    ],
)
def test_wrong_settings_are_found_before_anything_runs(tmp_path: Path, table: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, table + TWO_STARTS)
    assert said in str(caught.value)


def test_general_settings_go_to_the_methods_that_use_them(tmp_path: Path) -> None:
    starts = """
        data = "toy"
        detectors = ["detr"]
        [settings.pretrain-box]
        topk = 15
        momentum = 0.98
        projector.start = "kaiming"
        [[starts]]
        label = "AlignDet"
        [[starts]]
        label = "UP-DETR"
        pretrain-box = { method = "up-detr" }
        [[starts]]
        label = "DETReg"
        pretrain-box = { method = "detreg" }
    """
    runs = planned(tmp_path, "", starts)
    given = {run.start: run.settings.keys() for run in runs.values() if run.stage == "pretrain-box"}
    asked = {"topk", "momentum", "projector.start"}
    assert {label: asked & settings for label, settings in given.items()} == {
        "AlignDet": asked,
        "UP-DETR": set(),
        "DETReg": {"topk"},
    }
    own = starts.replace('"up-detr" }', '"up-detr", topk = 3 }')
    with pytest.raises(ConfigError, match="topk: no effect on --method up-detr; leave it out"):
        planned(tmp_path, "", own)


def test_the_example_is_what_it_says(tmp_path: Path) -> None:
    study = load_study(Path(__file__).parents[3] / "examples" / "study.toml")
    names = [run.name for run in plan_runs(study, Workspace(tmp_path)) if run.stage == "finetune"]
    assert sum("contrast-only" not in name for name in names) == 72 and len(names) == 72 + 30


def test_the_example_of_strong_backbones_pairs_every_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = load_study(Path(__file__).parents[3] / "examples" / "strong-backbones.toml")
    runs = list(plan_runs(study, Workspace(tmp_path / "w")))
    weights = [Path(run.config().backbone.weights).name for run in runs if run.stage == "pretrain-box"]
    assert weights == ["none", "imagenet.pth", "dinov3.pth"]
    finetunings = [run.config() for run in runs if run.stage == "finetune"]
    assert len(finetunings) == 6 * 3 and {config.backbone.name for config in finetunings} == {"convnext_tiny"}
    alone = {Path(config.backbone.weights).name for config in finetunings if config.init == "backbone"}
    assert alone == {"imagenet.pth", "dinov3.pth"}
