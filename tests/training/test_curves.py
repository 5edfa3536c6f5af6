import json
from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.plotting import REFERENCE
from aligndet_cli.tools.figures.panels import PANEL, for_print
from aligndet_cli.training.curves import MAX_POINTS, draw_runs, plot_comparison, plot_curves, read_log
from helpers.texts import clashing_texts

NUM_STEPS = 90_000


def panels_of(figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes}


def test_a_long_log_is_thinned_without_losing_its_extremes() -> None:
    steps = np.arange(1, NUM_STEPS + 1, dtype=np.float64)
    values = np.random.default_rng(0).uniform(1.0, 2.0, NUM_STEPS)
    values[12_345], values[54_321] = 9.0, 0.5
    [axes] = draw_runs({"": {"loss_cls": (steps, values)}}, limits={}).axes
    [line] = axes.lines
    [band] = axes.collections
    # 90,000 values in blocks of 225 are 400 points, each the mean of its block.
    assert len(line.get_xdata()) == MAX_POINTS == 400
    assert np.allclose(line.get_ydata(), values.reshape(400, 225).mean(axis=1))
    assert line.get_xdata()[0] == 113.0
    corners = band.get_paths()[0].vertices[:, 1]
    assert corners.max() == 9.0 and corners.min() == 0.5


def test_the_accuracy_by_chance_of_several_heads_is_that_of_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1, "chance": 1.75 * np.log(100), "head1_chance": np.log(100)}) + "\n")
    assert read_log(file)["accuracy_by_chance"][1] == pytest.approx(0.01)


def test_chance_and_limits_are_drawn_in(tmp_path: Path) -> None:
    lines = [
        {"step": step, "loss_contrastive": 3.0, "loss_cls": 0.5, "chance": np.log(1 + 99), "contrast_accuracy": 0.2}
        | {"counterparts": 0.97, "positive_similarity": 0.4, "negative_similarity": -0.1, "embedding_rank": 50.0}
        for step in (10, 20)
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "loss')  # cut off by a kill
    log = read_log(file)
    assert log["loss_cls"][0].tolist() == [10, 20]
    figure = draw_runs({"": log}, limits={"embedding_rank": (12.5, "collapsed below")})
    panels = panels_of(figure)
    assert list(panels) == [
        "Contrastive loss",
        "Losses",
        "Contrast accuracy",
        "Met in the other view",
        "Similarity of embeddings",
        "Embedding rank",
    ]
    by_chance = [line for axes in panels.values() for line in axes.lines if line.get_label() == "by chance"]
    # One of a positive and 99 negatives is the most alike: a loss of log(100), and right once in 100 times.
    assert [line.get_ydata()[0] for line in by_chance] == [np.log(100), np.exp(-np.log(100))]
    assert {line.get_color() for line in by_chance} == {REFERENCE}
    assert [line.get_ydata()[0] for line in panels["Embedding rank"].lines] == [50.0, 12.5]
    assert all(axes.get_xlabel() == "step" and axes.get_ylabel() for axes in panels.values())
    assert all(axes.get_xlim()[0] == 0 for axes in panels.values())
    # From 0, but for cosines and their loss.
    bottoms = {title: axes.get_ylim()[0] for title, axes in panels.items()}
    assert bottoms["Losses"] == bottoms["Embedding rank"] == 0
    assert bottoms["Similarity of embeddings"] < -0.1 and bottoms["Contrastive loss"] > 0


def test_no_panel_is_empty_and_each_has_its_own_chance_level(tmp_path: Path) -> None:
    """A backbone that learns five classes logs their chance level, and has no contrast."""
    line = {"step": 10, "loss_cls": 1.4, "chance": np.log(5), "accuracy": 0.5, "embedding_rank": 14.0}
    (tmp_path / "m").write_text(json.dumps(line) + "\n")
    panels = panels_of(draw_runs({"": read_log(tmp_path / "m")}, limits={}))
    assert list(panels) == ["Losses", "Embedding rank", "Accuracy"]
    levels = {
        title: [line.get_ydata()[0] for line in axes.lines if line.get_label() == "by chance"]
        for title, axes in panels.items()
    }
    assert levels == {"Losses": [np.log(5)], "Embedding rank": [], "Accuracy": [np.exp(-np.log(5))]}


def test_runs_differ_in_more_than_colour(tmp_path: Path) -> None:
    for name, value in (("a", 0.25), ("b", 0.5)):
        (tmp_path / name).write_text(f'{{"step": 5, "loss_cls": 1.0}}\n{{"step": 9, "loss_cls": 0.5, "AP": {value}}}\n')
    logs, colours = {name: read_log(tmp_path / name) for name in "ab"}, ["#123456", "#654321"]
    figure = draw_runs(logs, limits={}, title="both", colours=colours)
    panels = panels_of(figure)
    assert list(panels) == ["class", "AP"]
    for axes in panels.values():
        assert [line.get_label() for line in axes.lines] == ["a", "b"]
        assert len({line.get_linestyle() for line in axes.lines}) == 2
        assert [line.get_color() for line in axes.lines] == colours
        assert axes.get_xlim() == (0, 1.02 * 9)
    assert [line.get_ydata().tolist() for line in panels["AP"].lines] == [[25.0], [50.0]]


def test_errors_are_warnings(tmp_path: Path, caplog) -> None:
    plot_curves(tmp_path / "none.jsonl", tmp_path)
    plot_comparison({"a": tmp_path / "none.jsonl"}, tmp_path / "both.png")
    assert caplog.text.count("was not drawn: FileNotFoundError") == 2 and list(tmp_path.iterdir()) == []
    (tmp_path / "empty.jsonl").write_text("")
    plot_curves(tmp_path / "empty.jsonl", tmp_path / "plots")
    assert (tmp_path / "plots" / "curves.png").exists()


def test_losses_of_fine_tuning_come_first(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 5, "loss_cls": 1.0, "AP": 0.5}\n')
    assert list(panels_of(draw_runs({"": read_log(tmp_path / "m")}, limits={}))) == [
        "Losses",
        "On the validation split",
    ]
    (tmp_path / "m").write_text('{"step": 5, "AP": 0.5}\n')
    assert list(panels_of(draw_runs({"": read_log(tmp_path / "m")}, limits={}))) == ["On the validation split"]


def test_an_ap_of_zero_is_no_reason_for_negative_numbers(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 5, "AP": 0.0}\n{"step": 10, "AP": 0.0}\n')
    [axes] = draw_runs({"": read_log(tmp_path / "m")}, limits={}).axes
    assert axes.get_ylim() == (0, 1)


@pytest.mark.parametrize("num_losses", [1, 5])
def test_no_text_covers_another_on_screen_and_in_print(num_losses: int) -> None:
    steps = np.arange(1.0, 30.0)
    log = {f"loss_{name}": (steps, 1 / steps) for name in "abcde"[:num_losses]} | {"AP50": (steps, steps / 100)}
    names = [f"retinanet-resnet50-three-times-as-long-f1-p10-s{seed}" for seed in range(2)]
    logs = dict.fromkeys(names, log)
    title = " against ".join(names)
    assert clashing_texts(draw_runs(logs, limits={}, title=title)) == []
    with for_print():
        assert clashing_texts(draw_runs(logs, limits={}, title=title, panel=PANEL)) == []
