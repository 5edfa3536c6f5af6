from pathlib import Path

import pytest

from aligndet_cli.errors import ConfigError
from aligndet_cli.tools.study.plan import plan_runs
from aligndet_cli.tools.study.spec import load_study
from aligndet_cli.workspace import Workspace


def test_stages_of_a_start_stand_beside_its_label(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(
        'data = "a"\nevaluate_data = "b"\ndetectors = ["fcos"]\n'
        '[[starts]]\nlabel = "Contrast, only"\npretrain-box = { tasks = "contrastive" }\n'
    )
    study = load_study(file)
    (start,) = study.starts
    assert (start.init, start.settings) == ("pretrain", {"pretrain-box": {"tasks": "contrastive"}})
    assert start.slug == "contrast-only"
    assert study.data_of("evaluate") == Path("b").resolve()
    assert study.data_of("pretrain-image") == study.data_of("finetune") == Path("a").resolve()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("x = ", "study.toml: not valid TOML"),
        ("seed = [1]", "seed: unknown key (from "),
        ("seeds = [0, 1, 0]", "seeds: has a value twice"),
        ("fractions = [10, 10.0]", "fractions: has a value twice"),
        (f'[[starts]]\nlabel = "{61 * "b"}"', "starts.1.label: String should have at most 60 characters"),
        ("seeds = [-1]", "seeds.0: should be 0 to 4294967295"),
        ("fractions = [0]", "fractions.0: should be greater than 0"),
        ('detectors = ["retinanett"]', "'retinanett' is not a detector; did you mean 'retinanet'?"),
        ("[settings.finetun]", "settings: 'finetun' is not a stage; did you mean 'finetune'?"),
        ("[detector.detr.finetune]", "detector: detr is not among the study's: fcos"),
        ('[[starts]]\nlabel = "A!"', "start 'A!': gives the same run names as 'a'"),
        (
            '[[starts]]\nlabel = "b"\npretrain_box = {}',
            "'pretrain_box' is no key of a start; did you mean 'pretrain-box'?",
        ),
        ('[[starts]]\nlabel = "b"\ninit = "nothing.pt"', "start 'b': init = 'nothing.pt': write pretrain,"),
        ('[[starts]]\nlabel = "b"\nseeds = [7]', "start 'b': seeds: 7 is not among the study's: 0"),
        ('[[starts]]\nlabel = "!"', "start '!': the label needs a letter or a digit"),
    ],
)
def test_mistakes_are_one_line_with_the_place(tmp_path: Path, change: str, said: str) -> None:
    file = tmp_path / "study.toml"
    detectors = "" if change.startswith("detectors") else 'detectors = ["fcos"]'
    start = '[[starts]]\nlabel = "a"'
    parts = [start, change] if change.startswith("[") else [change, start]
    file.write_text("\n".join(['data = "toy"', detectors, *parts]))
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_study_names_data_detectors_and_starts(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("seeds = [1]")
    with pytest.raises(ConfigError, match="data, detectors, starts: missing"):
        load_study(tmp_path / "study.toml")
    with pytest.raises(ConfigError, match="nowhere.toml: no such file"):
        load_study(tmp_path / "nowhere.toml")


BASE = """
detectors = ["fcos", "retinanet"]
seeds = [0, 1]
[settings.common]
"backbone.name" = "resnet18"
"training.batch_size" = 8
[detector.fcos.finetune]
"training.lr" = 0.01
[[starts]]
label = "backbone only"
init = "backbone"
[[starts]]
label = "lower"
detectors = ["fcos"]
seeds = [1]
"""


def test_detectors_may_have_starts_of_one_label_with_seeds_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(
        'data = "toy"\ndetectors = ["retinanet", "fcos"]\nseeds = [0, 1]\n'
        '[[starts]]\nlabel = "a"\ninit = "backbone"\ndetectors = ["retinanet"]\n'
        '[[starts]]\nlabel = "a"\ninit = "backbone"\ndetectors = ["fcos"]\nseeds = [1]\n'
    )
    (tmp_path / "toy").mkdir()
    runs = plan_runs(load_study(tmp_path / "study.toml"), Workspace(tmp_path / "workspace"))
    assert [run.name for run in runs if run.stage == "finetune"] == ["retinanet-a-s0", "retinanet-a-s1", "fcos-a-s1"]


def test_a_study_extends_another_and_says_only_what_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.toml").write_text(BASE)
    (tmp_path / "shared" / "cells.toml").write_text(
        'extends = "base.toml"\ndata = "cells"\n[settings.common]\n"training.batch_size" = 4\n'
        '[settings.evaluate]\nmetric = "coco"\n[detector.fcos.finetune]\n"training.steps" = 9\n'
    )
    study = load_study(tmp_path / "shared" / "cells.toml")
    assert study.data == Path("cells")  # as in any study file, from where the command runs
    assert study.settings == {
        "common": {"backbone.name": "resnet18", "training.batch_size": 4},
        "evaluate": {"metric": "coco"},
    }
    assert study.detector == {"fcos": {"finetune": {"training.lr": 0.01, "training.steps": 9}}}
    assert [start.label for start in study.starts] == ["backbone only", "lower"]
    # a third on top; what it leaves out of lists may still be spoken of below
    (tmp_path / "fewer.toml").write_text('extends = "shared/cells.toml"\ndetectors = ["retinanet"]\nseeds = [0]\n')
    fewer = load_study(tmp_path / "fewer.toml")
    assert (fewer.detectors, fewer.seeds, fewer.data) == (("retinanet",), (0,), Path("cells"))
    (tmp_path / "other.toml").write_text(
        'extends = "shared/cells.toml"\n[[starts]]\nlabel = "one"\ninit = "backbone"\n'
    )
    assert [start.label for start in load_study(tmp_path / "other.toml").starts] == ["one"]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ('extends = "gone.toml"', "{own}: extends 'gone.toml': no such file"),
        ('extends = "own.toml"', "{own}: extends 'own.toml': the files extend each other in a circle"),
        ('extends = "circle.toml"', "circle.toml: extends 'own.toml': the files extend each other in a circle"),
        ('extends = ["base.toml"]', "{own}: extends: should be the name of one file, got ['base.toml']"),
        ('extends = "bad.toml"', "{own}: extends 'bad.toml': not valid TOML"),
        ('extends = "base.toml"', "{own}: data: missing"),
        ('extends = "base.toml"\ndata = "a"\nseed = [1]', "seed: unknown key (from {own}); did you mean 'seeds'?"),
        ('extends = "old.toml"\ndata = "a"', "old: unknown key (from "),
        (
            'extends = "base.toml"\ndata = "a"\n[detector.detr.finetune]',
            "detector: detr is not among the study's: fcos",
        ),
        (
            'extends = "base.toml"\ndata = "a"\ndetectors = ["retinanet", "fcos"]\n[detector.detr.finetune]',
            "detector: detr is not among the study's: retinanet, fcos",
        ),
    ],
)
def test_mistakes_in_files_that_extend_others_name_the_file(tmp_path: Path, own: str, said: str) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "bad.toml").write_text("x = ")
    (tmp_path / "old.toml").write_text(f"old = 1\n{BASE}")
    (tmp_path / "circle.toml").write_text('extends = "own.toml"')
    (tmp_path / "own.toml").write_text(own)
    with pytest.raises(ConfigError) as caught:
        load_study(tmp_path / "own.toml")
    assert said.format(own=tmp_path / "own.toml") in str(caught.value) and "\n" not in str(caught.value)
    assert "old: " not in str(caught.value) or f"{tmp_path / 'old.toml'}" in str(caught.value)
    known = str(caught.value).partition("the study's: ")[2].split(", ")
    assert len(known) == len(set(known))
