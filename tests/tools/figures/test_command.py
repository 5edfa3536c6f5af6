"""The figures of a pair of runs, and a pre-training run whose pictures could not be drawn."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligndet_cli.config import DataConfig
from aligndet_cli.data.open import open_images
from aligndet_cli.errors import ConfigError
from aligndet_cli.plotting import COLOURS
from aligndet_cli.tools.figures import command
from aligndet_cli.tools.figures.panels import draw_centres, draw_embeddings
from aligndet_cli.tools.figures.pretrained import Embeddings, embed_objects, load_stages, neighbour_share
from aligndet_cli.workspace import Workspace
from helpers.commandline import CHAIN, aligndet, run_chain

pytestmark = pytest.mark.plots


@pytest.fixture(scope="module")
def pair(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain, and a run from scratch beside its pre-trained one."""
    workspace = Path(shutil.copytree(chain, tmp_path_factory.mktemp("figures") / "workspace"))
    more = {"finetune": ("--init", "scratch", "--name", "plain"), "evaluate": ("--run", "plain")}
    run_chain(chain, workspace, "finetune", "evaluate", more=more)
    return workspace


def test_all_figures_of_a_pair_of_runs(pair: Path) -> None:
    ran = aligndet("figures", "-w", pair, "--json").json()
    assert (ran["compared_with"], ran["not_drawn"]) == ("plain", [])
    names = [f"figure_{number}.png" for number in (4, 5, 7, 10)]
    assert ran["files"] == [str(pair / "figures" / name) for name in names]
    for name in names:
        with Image.open(pair / "figures" / name) as image:
            assert np.asarray(image.convert("L")).std() > 5


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_figures_for_print(pair: Path, tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(command, "_find_stages", _raise_gone)  # without figure 4, which takes a second
    ran = aligndet("figures", "-w", pair, "-o", tmp_path, "--format", kind, "--json").json()
    assert ran["files"] == [str(tmp_path / f"figure_{number}.{kind}") for number in (5, 7, 10)]
    start = (tmp_path / f"figure_7.{kind}").read_bytes()[:5]
    assert start == {"pdf": b"%PDF-", "svg": b"<?xml"}[kind]
    no = aligndet("figures", "-w", pair, "--format", "pfd", code=2).error_line()
    assert no == "error: --format pfd: is not a choice; did you mean 'pdf'?"


def test_what_is_asked_for_must_be_there(pair: Path, chain: Path, tmp_path: Path) -> None:
    lone = aligndet("figures", "-w", chain, code=2).error_line()
    assert "no two evaluations of the same images, one of a pre-trained run and one without" in lone
    assert aligndet("figures", "-w", pair, "--run", "x", code=2).error_line().startswith("error: --run x: no run of")
    (tmp_path / "file").touch()
    assert aligndet("figures", "-w", pair, "-o", tmp_path / "file", code=2).error_line().endswith("name a folder")
    below = aligndet("figures", "-w", pair, "-o", tmp_path / "file" / "x", code=1).error_line()
    assert "Not a directory; choose a --workspace or --output" in below


def test_one_figure_that_fails_costs_no_other(pair: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(command, "draw_runs", fail)
    monkeypatch.setattr(command, "draw_image_rows", fail)
    monkeypatch.setattr(command, "_find_stages", _raise_gone)
    drawn = command.write_figures(Workspace(pair), folder=tmp_path)
    assert [file.name for file in drawn.files] == ["figure_5.png"]
    assert "figure_7: RuntimeError('no room')" in drawn.not_drawn and caplog.text.count("not drawn") == 3


def _raise_gone(*_: object) -> None:
    raise ConfigError("gone")


def test_pretraining_starts_where_the_first_panel_says(pair: Path) -> None:
    workspace = Workspace(pair)
    run = workspace.require("pretrain-box")
    stages = load_stages(run, workspace, "cpu")
    before, after = stages.before.online.state_dict(), stages.after.online.state_dict()
    same = {name for name in before if before[name].equal(after[name])}
    # A frozen backbone and the class predictor are what they were; the neck is not.
    assert {name for name in before if name.startswith("backbone.")} <= same
    assert not [name for name in same if name.startswith("neck.") and name.endswith("weight")]


def test_classes_of_one_name_are_embedded_apart(pair: Path, toy: Path) -> None:
    workspace = Workspace(pair)
    stages = load_stages(workspace.require("pretrain-box"), workspace, "cpu")
    plain = open_images(DataConfig(root=toy), purpose="val")
    equal = replace(plain, categories=tuple(replace(category, name="cat") for category in plain.categories))
    found = [embed_objects(stages.after, stages.config, data, "cpu") for data in (plain, equal)]
    assert (found[0].places == found[1].places).all() and set(found[0].places.tolist()) == {0, 1, 2}
    ids = {category.name: category.category_id for category in plain.categories}
    assert [plain.categories[class_id].name for class_id in found[0].class_ids] == list(found[0].classes)
    assert found[1].classes == tuple(f"cat (id {ids[name]})" for name in found[0].classes)


def test_neighbours_worked_out_by_hand() -> None:
    # Two classes on two directions, but the last of the second among the first.
    values = np.array([[1, 0], [0.99, 0.1], [0, 1], [0.1, 0.99], [0.98, 0.15]], dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    embeddings = Embeddings(values, np.array([0, 0, 1, 1, 1]), np.full(5, 40.0, np.float32), ("a", "b"), (4, 1))
    # Four neighbours of each of five are all others: 2 x 1 + 3 x 2 of 20 pairs are of one class, as by chance.
    assert neighbour_share(embeddings) == (pytest.approx(0.4), pytest.approx(0.4))
    # The fifth and the second class of the data, in the colours that they have in other pictures.
    shown = draw_embeddings({"x": embeddings}, "", 0).legends[0].legend_handles[:2]
    assert [handle.get_color() for handle in shown] == [COLOURS[4], COLOURS[1]]
    with pytest.raises(ValueError, match="3 labelled objects are too few"):
        draw_embeddings({"x": Embeddings(values[:3], np.zeros(3, int), np.ones(3, np.float32), ("a",), (0,))}, "", 0)


def test_centres_stand_where_they_are() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    figure = draw_centres([(pixels, {"a": np.array([[10.0, 30.0]]), "none": np.zeros((0, 2))})], "title")
    first, second = figure.axes
    assert first.collections[0].get_offsets().tolist() == [[10.0, 30.0]]
    assert first.get_ylim() == (39.5, -0.5) and second.get_title() == "none: 0 boxes"


def test_pictures_that_fail_do_not_fail_the_run(chain: Path, tmp_path: Path, monkeypatch) -> None:
    workspace = Path(shutil.copytree(chain, tmp_path / "w"))
    shutil.rmtree(workspace / "pretrain-box")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("aligndet_cli.pretrain_box.stage.draw_first_views", fail)
    monkeypatch.setattr("aligndet_cli.training.curves.draw_runs", fail)
    ran = aligndet("pretrain-box", "-w", workspace, *CHAIN["pretrain-box"])
    assert ran.stderr.count("was not drawn: RuntimeError: no font") == 2
    [run], [whole] = ((root / "pretrain-box").iterdir() for root in (workspace, chain))
    assert not (run / "plots").exists() and (whole / "plots" / "views.jpg").exists()
    hashes = [json.loads((one / "manifest.json").read_text())["content_hash"] for one in (run, whole)]
    assert hashes[0] == hashes[1]
