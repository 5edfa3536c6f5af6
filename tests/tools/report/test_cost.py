"""Costs of training: by hand from the logs, in the tables, and once for all runs that share it."""

import csv
import json
from pathlib import Path

import pytest

from aligndet_cli.tools.report.cost import cost_of
from aligndet_cli.workspace import Workspace
from helpers.commandline import aligndet
from helpers.reports import Tuned, add_evaluated, add_imported, add_pretrained


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Three seeds on one pre-training, a fourth on another one, the baseline, and an imported pre-training."""
    for name, steps, rates in (("one", 900, (4.0, 2.0)), ("two", 1800, (4.0, 4.0))):
        add_pretrained(tmp_path, name, content_hash=name, steps=steps, training={"batch_size": 8})
        lines = [{"step": step, "images_per_s": rate} for step, rate in zip((steps // 2, steps), rates, strict=True)]
        (tmp_path / "pretrain-box" / name / "speed.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    add_imported(tmp_path, "bought", layout="soco", epochs=400, detector={"family": "retinanet"})
    for seed in range(4):
        pretrained = "two" if seed == 3 else "one"
        add_evaluated(tmp_path, Tuned(f"a{seed}", "pretrain", seed=seed, weights=pretrained, label="ours"), 0.1)
        line = {"step": 90_000, "images_per_s": 40 * (1 + seed % 2)}  # 90,000 steps of 16 images: 10 or 5 hours
        (tmp_path / "finetune" / f"a{seed}" / "speed.jsonl").write_text(f"{json.dumps(line)}\n")
        add_evaluated(tmp_path, Tuned(f"b{seed}", seed=seed), 0.1)
    add_evaluated(tmp_path, Tuned("c0", "pretrain", weights="bought", label="theirs"), 0.1)
    return tmp_path


def test_cost_by_hand(workspace: Path) -> None:
    place = Workspace(workspace)
    one, two, bought = (place.find("pretrain-box", name) for name in ("one", "two", "bought"))
    assert one is not None and two is not None and bought is not None
    # 450 steps of 8 images at 4 and 450 at 2 images per second: 900 s and 1800 s.
    cost = cost_of(one)
    assert cost is not None and (cost.images, cost.hours) == (7200, pytest.approx(0.75))
    cost = cost_of(two)
    assert cost is not None and (cost.images, cost.hours) == (14400, pytest.approx(1.0))
    assert cost_of(bought) is None
    (one.folder / "speed.jsonl").unlink()
    cost = cost_of(one)
    assert cost is not None and cost.hours is None


def test_the_report_has_costs_on_request(workspace: Path) -> None:
    words = ("report", "-w", workspace, "--metric", "AP")
    assert "images seen" not in aligndet(*words).stdout
    header, *_ = lines = aligndet(*words, "--costs", "--format", "markdown").stdout.splitlines()
    assert header.endswith("| images seen | hours | fine-tuning hours | remark |")
    cells = {line.split(" | ")[5]: [cell.strip() for cell in line.split(" | ")[-4:-1]] for line in lines[2:5]}
    # The mean of the two pre-trainings, however many runs share one, and of the four fine-tunings.
    assert cells == {"backbone only": ["", "", ""], "ours": ["10,800", "0.88", "7.50"], "theirs": ["", "", ""]}
    rows = {row["label"]: row["cost"] for row in aligndet(*words, "--costs", "--json").json()["rows"]}
    assert rows == {"backbone only": None, "ours": {"images": 10800, "hours": pytest.approx(0.875)}, "theirs": None}
    tuned = {row["label"]: row["tuning_cost"] for row in aligndet(*words, "--costs", "--json").json()["rows"]}
    assert tuned["ours"] == {"images": 1_440_000, "hours": pytest.approx(7.5)} and tuned["theirs"]["hours"] is None
    header, *lines = csv.reader(aligndet(*words, "--costs", "--format", "csv").stdout.splitlines())
    told = {line[header.index("start")]: line[header.index("finetune_hours")] for line in lines}
    assert told["theirs"] == "" and float(told["ours"]) == pytest.approx(7.5)
    assert (
        aligndet(*words, "--costs", "--html", code=2)
        .error_line()
        .endswith("--costs: no effect on --html; leave it out")
    )
