import itertools
from pathlib import Path

import numpy as np
from PIL import ImageColor

from aligndet_cli.artifacts.starts import find_starts, tell_apart
from aligndet_cli.plotting import COLOURS, all_colours
from aligndet_cli.workspace import Workspace
from helpers.reports import Tuned, add_imported, add_pretrained, add_tuned


def colours_of(workspace: Path) -> dict[str, str]:
    return {start.label: start.colour for start in find_starts(Workspace(workspace)).values()}


def test_names_and_colours_of_the_usual_starts_do_not_depend_on_their_order(tmp_path: Path) -> None:
    usual = {"AlignDet": COLOURS[1], "backbone only": COLOURS[0], "scratch": COLOURS[2]}
    for name, order in (("a", ("pretrain", "backbone", "scratch")), ("b", ("scratch", "pretrain", "backbone"))):
        for init in order:
            add_tuned(tmp_path / name, Tuned(init, init=init))
        assert colours_of(tmp_path / name) == usual


def test_a_new_start_changes_no_colour(tmp_path: Path) -> None:
    found: dict[str, str] = {}
    for place in range(20):
        add_tuned(tmp_path, Tuned(f"run-{place}", init="pretrain", label=f"start {place}"))
        now = colours_of(tmp_path)
        assert len(now) == place + 1 and found.items() <= now.items()
        found = now
    assert len(set(found.values())) == 20


def test_pretrainings_without_a_label_are_told_apart(tmp_path: Path) -> None:
    add_pretrained(tmp_path, "long", content_hash="long")
    for weights in ("long", "gone-hash"):
        add_tuned(tmp_path, Tuned(weights, init="pretrain", weights=weights))
    assert list(colours_of(tmp_path)) == ["AlignDet, long", "AlignDet, gone-h"]


def test_pretrainings_are_called_by_their_methods(tmp_path: Path) -> None:
    for name, method in (("one", "classes"), ("two", "soco"), ("three", "soco"), ("four", "aligndet")):
        add_pretrained(tmp_path, name, content_hash=name, method=method)
        add_tuned(tmp_path, Tuned(name, init="pretrain", weights=name))
    for name, layout in (("five", "up-detr"), ("six", "mmdet")):
        add_imported(tmp_path, name, layout=layout, epochs=None, detector={"family": "detr"})
        add_tuned(tmp_path, Tuned(name, init="file", weights=name, detector="detr"))
    names = ["clusters as classes", "SoCo, two", "SoCo, three", "AlignDet", "UP-DETR"]
    assert list(colours_of(tmp_path)) == names  # of mmdetection's files there are only AlignDet's


def test_runs_in_one_picture_differ_in_name_and_colour(tmp_path: Path) -> None:
    for name, init in (("plain", "backbone"), ("one", "pretrain"), ("two", "pretrain")):
        add_tuned(tmp_path, Tuned(name, init=init))
    plain, one, two = find_starts(Workspace(tmp_path)).values()
    assert tell_apart([plain, two]) == {"backbone only": plain.colour, "AlignDet": two.colour}
    apart = tell_apart([one, two])
    assert list(apart) == ["one", "two"] and apart["one"] == one.colour != apart["two"]


def test_twenty_colours_are_far_from_each_other_and_from_white() -> None:
    colours = [np.array(ImageColor.getrgb(colour)) for colour in itertools.islice(all_colours(), 20)]
    for one, other in itertools.combinations([*colours, np.array((255, 255, 255))], 2):
        assert np.linalg.norm(one - other) > 50
