"""The script that draws the README's picture, on the chain's workspace."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligndet_cli.tools.report.collect import collect_report
from aligndet_cli.workspace import Workspace
from helpers.pages import make_large_study

pytestmark = pytest.mark.plots

GAIN = Path(__file__).parents[3] / "examples" / "gain.py"


def test_photographs_and_bars(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["gain.py", str(chain), "--output", str(tmp_path / "gain.png"), "--photos", "1"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(GAIN), run_name="__main__")
    with Image.open(tmp_path / "gain.png") as image:
        assert image.size == (1600, 528) and np.asarray(image.convert("L"))[100:400, :500].std() > 20  # a photograph


def test_bars_are_the_numbers_of_the_report(chain: Path, tmp_path: Path) -> None:
    report = collect_report(Workspace(make_large_study(tmp_path / "w"))).to_json()
    rows = [row for row in report["rows"] if row["setting"]["detector"] == "fcos"]
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows}))
    figure = runpy.run_path(str(GAIN))["draw_gain"](Workspace(chain), {"rows": rows}, ["AP", "AP75"], 1)
    bars = figure.axes[-1]
    # Four starts of 1 and 100 %, at AP and AP75; the first is 20.1 and 21.1, and the second 1 more.
    assert len(bars.patches) == 16 and bars.patches[0].get_height() == pytest.approx(20.6)
    assert bars.texts[0].get_text() == "+1.0\n± 0.0"
    assert bars.get_xticklabels()[0].get_text() == "AP\n1172 images labelled\n12000 steps"
