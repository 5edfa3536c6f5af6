import json
import math
import re
from pathlib import Path

import pytest

from aligndet_cli.errors import ConfigError
from aligndet_cli.tools.report.collect import Report, Row, collect_report, headline
from aligndet_cli.tools.report.page import collect_page
from aligndet_cli.tools.report.table import table_lines
from aligndet_cli.workspace import Workspace
from helpers.commandline import aligndet
from helpers.reports import Tuned, add_evaluated, add_imported, add_pretrained, add_tuned, evaluate_tuned


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Three folds of 1 %, one of them without its baseline, and one run with all images."""
    for fold, plain, ours in ((1, 0.080, 0.100), (2, 0.090, 0.085), (3, None, 0.110)):
        share = {"fraction": 1.0, "fold": fold, "images": 1172, "steps": 12_000}
        if plain is not None:
            add_evaluated(tmp_path, Tuned(f"plain-f{fold}", **share), plain, 2 * plain)
        add_evaluated(tmp_path, Tuned(f"ours-f{fold}", init="pretrain", weights="own", **share), ours, 2 * ours)
    add_evaluated(tmp_path, Tuned("plain"), 0.363, 0.5, 0.25)
    return tmp_path


def rows_by_label(report: Report) -> dict[str, Row]:
    return {row.label: row for row in report.rows}


def rows_of(report: Report) -> dict[tuple[float, str], Row]:
    return {(row.setting.fraction, row.label): row for row in report.rows}


def test_runs_of_equal_weights_keep_their_labels(tmp_path: Path) -> None:
    """The label is no input: the same run under two labels has the same weights."""
    for label, ap in (("first", 0.1), ("second", 0.2)):
        add_evaluated(tmp_path, Tuned(label, label=label), ap)
        for stage, name, key in (("finetune", label, "content_hash"), ("evaluate", f"{label}-val", "weights")):
            file = tmp_path / stage / name / "manifest.json"
            manifest = json.loads(file.read_text())
            (manifest if stage == "finetune" else manifest["inputs"])[key] = "equal"
            file.write_text(json.dumps(manifest))
    rows = rows_by_label(collect_report(Workspace(tmp_path)))
    assert {label: row.summaries["AP"].mean for label, row in rows.items()} == {"first": 0.1, "second": 0.2}
    assert [row.runs for row in rows.values()] == [("first",), ("second",)]
    page = collect_page(Workspace(tmp_path), collect_report(Workspace(tmp_path)))
    told = {part.title: part.start.label for part in page.runs if part.start is not None}
    assert told == {"first": "first", "second": "second", "first-val": "first", "second-val": "second"}


def test_means_spreads_and_paired_differences(workspace: Path) -> None:
    report = collect_report(Workspace(workspace))
    rows = rows_of(report)
    assert list(rows) == [(1, "backbone only"), (1, "AlignDet"), (100, "backbone only")]
    plain, ours = rows[1, "backbone only"], rows[1, "AlignDet"]
    assert plain.is_baseline and not ours.is_baseline and plain.summaries["AP"].delta is None
    # 8 and 9 %: mean 8.5, sample standard deviation sqrt(2 * 0.5^2 / 1) = 0.7071
    assert plain.summaries["AP"].mean == pytest.approx(0.085)
    assert plain.summaries["AP"].std == pytest.approx(math.sqrt(0.5) / 100)
    # 10, 8.5 and 11 %: mean 9.8333, sum of squares 0.0278 + 1.7778 + 1.3611 = 3.1667, over 2: 1.5833
    assert ours.summaries["AP"].mean == pytest.approx(0.295 / 3)
    assert ours.summaries["AP"].std == pytest.approx(math.sqrt(1.58333333) / 100)
    # Pairs +2 and -0.5: mean 0.75, deviation 1.7678, standard error 1.7678 / sqrt(2) = 1.25; fold 3 has no partner
    delta = ours.summaries["AP"].delta
    assert delta is not None and (delta.wins, delta.num_pairs) == (1, 2)
    assert delta.mean == pytest.approx(0.0075) and delta.standard_error == pytest.approx(0.0125)
    double = ours.summaries["AP50"].delta
    assert double is not None and double.mean == pytest.approx(0.015)
    assert ours.remark == "1 of 3 without a baseline run of the same fold and seed"
    assert plain.remark == "1 fewer than others"
    assert "AP75" not in ours.summaries  # not measurable there
    alone = rows[100, "backbone only"].summaries["AP"]
    assert (alone.mean, alone.std, alone.count) == (0.363, None, 1)


def test_the_headline_says_how_sure_it_is(tmp_path: Path) -> None:
    assert headline(collect_report(Workspace(tmp_path))) == ""
    add_evaluated(tmp_path, Tuned("plain"), 0.35)
    alone = "backbone only: 35.0 AP, and no other start to compare it with."
    assert headline(collect_report(Workspace(tmp_path))) == alone
    add_evaluated(tmp_path, Tuned("scratch", init="scratch", weights="none"), 0.1)
    add_evaluated(tmp_path, Tuned("ours", init="pretrain", weights="own"), 0.388)
    one = "AlignDet +3.8 AP over backbone only, 1 pair: a sign, not proof."
    assert headline(collect_report(Workspace(tmp_path))) == one
    for place, value in enumerate((0.34, 0.36), start=1):
        add_evaluated(tmp_path, Tuned(f"plain-{place}", seed=place), value - 0.04)
        add_evaluated(tmp_path, Tuned(f"ours-{place}", init="pretrain", weights="own", seed=place), value)
    # 3.8, 4 and 4: mean 3.93, standard error 0.0667, times 4.3027 (two degrees of freedom): 0.287
    several = "AlignDet +3.9 ± 0.1 AP over backbone only, 3 pairs: 95 % interval +3.6 to +4.2, ahead in 3 of 3."
    assert headline(collect_report(Workspace(tmp_path))) == several
    few = {"fraction": 1.0, "images": 1172, "steps": 12_000}
    add_evaluated(tmp_path, Tuned("plain-few", **few), 0.08)
    add_evaluated(tmp_path, Tuned("ours-few", init="pretrain", weights="own", **few), 0.07)
    mixed = "AlignDet -1.0 to +3.9 AP over backbone only in 2 settings, ahead in 3 of 4 pairs."
    assert headline(collect_report(Workspace(tmp_path))) == mixed


def test_the_headline_of_equal_numbers_is_no_sign(tmp_path: Path) -> None:
    add_evaluated(tmp_path, Tuned("plain"), 0.3)
    add_evaluated(tmp_path, Tuned("ours", init="pretrain", weights="own"), 0.3)
    assert (
        headline(collect_report(Workspace(tmp_path))) == "AlignDet +0.0 AP over backbone only, 1 pair: no difference."
    )


def test_the_headline_of_equal_gains_in_several_settings(tmp_path: Path) -> None:
    for place, steps in enumerate((12_000, 90_000)):
        add_evaluated(tmp_path, Tuned(f"plain-{place}", steps=steps), 0.35)
        add_evaluated(tmp_path, Tuned(f"ours-{place}", init="pretrain", weights="own", steps=steps), 0.36)
    told = "AlignDet +1.0 AP over backbone only in 2 settings, ahead in 2 of 2 pairs."
    assert headline(collect_report(Workspace(tmp_path))) == told


def test_a_loss_that_rounds_to_nothing_has_no_minus(tmp_path: Path) -> None:
    add_evaluated(tmp_path, Tuned("plain"), 0.3)
    add_evaluated(tmp_path, Tuned("ours", init="pretrain", weights="own"), 0.2997)
    assert "AlignDet +0.0 AP" in headline(collect_report(Workspace(tmp_path)))


def test_the_headline_is_about_the_start_with_the_most_pairs(tmp_path: Path) -> None:
    for seed in range(2):
        add_evaluated(tmp_path, Tuned(f"plain-{seed}", seed=seed), 0.3)
        if seed == 0:
            add_evaluated(tmp_path, Tuned("tried", init="pretrain", label="tried once"), 0.4)
        add_evaluated(
            tmp_path, Tuned(f"ours-{seed}", init="pretrain", label="tried twice", seed=seed), 0.35 + seed / 100
        )
    assert headline(collect_report(Workspace(tmp_path))).startswith(
        "tried twice +5.5 ± 0.5 AP over backbone only, 2 pairs"
    )


def test_the_headline_of_starts_that_have_no_pair(tmp_path: Path) -> None:
    add_evaluated(tmp_path, Tuned("plain"), 0.3)
    add_evaluated(tmp_path, Tuned("ours", init="pretrain", weights="own", seed=1), 0.4)
    apart = "2 starts of 30.0 to 40.0 AP, and none has a run of the baseline with its setting, fold and seed"
    assert headline(collect_report(Workspace(tmp_path))) == f"{apart} to compare it with."
    add_evaluated(tmp_path, Tuned("short", steps=12_000), 0.2)
    assert headline(collect_report(Workspace(tmp_path))).startswith("2 starts of 20.0 to 40.0 AP, and none has")
    nothing = collect_report(Workspace(tmp_path), metrics=("AP75",))
    assert headline(nothing) == "AP75 could be measured in no run."


def test_any_start_can_be_the_baseline(workspace: Path) -> None:
    rows = rows_of(collect_report(Workspace(workspace), baseline="AlignDet"))
    delta = rows[1, "backbone only"].summaries["AP"].delta
    assert delta is not None and delta.mean == pytest.approx(-0.0075)
    assert rows[100, "backbone only"].summaries["AP"].delta is None and not rows[100, "backbone only"].is_baseline


def test_of_two_runs_of_one_fold_and_seed_the_newer_counts(workspace: Path) -> None:
    add_evaluated(workspace, Tuned("again"), 0.5)
    row = rows_of(collect_report(Workspace(workspace)))[100, "backbone only"]
    assert row.summaries["AP"].mean == 0.5 and row.runs == ("again",)
    assert row.remark == "1 older of the same fold and seed left out"


def test_other_data_steps_and_batches_are_other_settings(workspace: Path) -> None:
    add_evaluated(workspace, Tuned("short", init="pretrain", weights="own", steps=80_000), 0.1)
    add_evaluated(workspace, Tuned("batch", init="pretrain", weights="own", batch_size=8), 0.1)
    rows = collect_report(Workspace(workspace)).rows
    schedules = [row.setting.schedule for row in rows if row.label == "AlignDet" and row.setting.fraction == 100]
    assert schedules == ["80000 steps", "90000 steps of 8"]
    assert all(row.summaries["AP"].delta is None for row in rows if row.setting.fraction == 100)


def test_settings_of_the_same_words_are_told_apart(tmp_path: Path) -> None:
    """One run, measured on all images of the test split, on the first 40, on 40 others, and at another size."""
    content_hash = add_tuned(tmp_path, Tuned("ours", init="pretrain"))
    few, sides = {"data": "few"}, {"short_side": 96, "long_side": None}
    evaluate_tuned(tmp_path, "all", content_hash, 0.3, images=72, split="test")
    (only,) = aligndet("report", "-w", tmp_path, "--json").json()["rows"]
    assert (only["setting"]["evaluated"], only["setting"]["content"]) == ("test", ["coco", "val", ""])
    assert "  coco, test  " in aligndet("report", "-w", tmp_path).stdout
    evaluate_tuned(tmp_path, "few", content_hash, 0.2, images=40, split="test", inputs=few)
    evaluated = {row.setting.evaluated for row in collect_report(Workspace(tmp_path)).rows}
    assert evaluated == {"test, 72 images", "test, 40 images"}
    evaluate_tuned(tmp_path, "others", content_hash, 0.2, images=40, split="test", inputs={"data": "others"})
    evaluate_tuned(tmp_path, "small", content_hash, 0.1, images=40, split="test", measured_with=sides, inputs=few)
    rows = collect_report(Workspace(tmp_path)).rows
    assert {row.setting.evaluated: row.summaries["AP"].mean for row in rows} == {
        "test, 72 images val": 0.3,
        "test, 40 images few": 0.2,
        "test, 40 images others": 0.2,
        "test, 40 images few, short side 96": 0.1,
    }
    chart = collect_page(Workspace(tmp_path), collect_report(Workspace(tmp_path))).chart
    assert chart is not None and len({setting for setting, _ in chart.groups}) == 4


def test_a_single_step_is_one(tmp_path: Path) -> None:
    add_evaluated(tmp_path, Tuned("ours", init="pretrain", steps=1), 0.3)
    assert [row.setting.schedule for row in collect_report(Workspace(tmp_path)).rows] == ["1 step"]


def test_the_usual_split_is_not_named(tmp_path: Path) -> None:
    add_evaluated(tmp_path, Tuned("ours", init="pretrain"), 0.3, split="val2017")
    report = collect_report(Workspace(tmp_path))
    assert [row.setting.evaluated for row in report.rows] == ["val2017"]
    assert "val2017" not in "".join(table_lines(report, None))


def test_starts_without_a_label_are_told_apart(workspace: Path) -> None:
    for name in ("one", "two"):
        add_pretrained(workspace, name, content_hash=name)
        add_evaluated(workspace, Tuned(f"from-{name}", init="file", weights=name), 0.1)
    add_evaluated(workspace, Tuned("labelled", init="file", weights="two", label="longer"), 0.2)
    add_evaluated(workspace, Tuned("nothing", init="scratch", weights="none"), 0.01)
    labels = [row.label for row in collect_report(Workspace(workspace)).rows if row.setting.fraction == 100]
    assert labels == ["backbone only", "AlignDet, one", "AlignDet, two", "longer", "scratch"]


def test_runs_that_differ_only_in_backbone_weights_are_not_compared(tmp_path: Path) -> None:
    for weights in ("/x/moco.pth.tar", "/x/pretrain-image/own/weights.pt"):
        of = {"backbone_weights": weights, "label": "plain"}
        add_evaluated(tmp_path, Tuned(f"plain-{len(weights)}", weights=weights, **of), 0.1)
    add_imported(tmp_path, "soco", layout="soco", epochs=400, detector={"family": "retinanet"})
    add_evaluated(tmp_path, Tuned("from-soco", init="file", weights="soco", label="plain"), 0.1)
    rows = collect_report(Workspace(tmp_path)).rows
    names = ["resnet50, moco.pth", "resnet50, own", "resnet50, imported"]
    assert sorted(row.setting.backbone for row in rows) == sorted(names)
    assert all(row.is_baseline and not row.remark for row in rows if row.kind == "backbone")


def test_a_pretraining_per_seed_is_one_start(tmp_path: Path) -> None:
    for seed in (0, 1):
        add_pretrained(tmp_path, f"pre-{seed}", content_hash=f"pre-{seed}")
        add_evaluated(tmp_path, Tuned(f"s{seed}", "file", "AlignDet", weights=f"pre-{seed}", seed=seed), 0.1)
    [row] = collect_report(Workspace(tmp_path)).rows
    assert row.label == "AlignDet" and row.runs == ("s0", "s1")


def test_evaluations_of_runs_that_are_gone_are_named(workspace: Path) -> None:
    manifest = workspace / "finetune" / "plain" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"content_hash": "plain', '"content_hash": "other'))
    report = collect_report(Workspace(workspace))
    assert (100, "backbone only") not in rows_of(report)
    assert report.remarks == ["left out, the run they measured is gone or was made anew: plain-val"]


def test_imported_detectors_have_a_row(tmp_path: Path) -> None:
    add_evaluated(tmp_path, Tuned("released"), 0.373)
    file = tmp_path / "finetune" / "released" / "config.json"
    file.write_text('{"detector": {"family": "fcos"}, "backbone": {"name": "resnet50"}, "layout": "mmdet", "seed": 0}')
    (row,) = collect_report(Workspace(tmp_path)).rows
    assert (row.label, row.setting.schedule, row.setting.detector) == ("released", "as imported", "fcos")


def test_other_metrics_are_read_from_the_evaluation(workspace: Path) -> None:
    report = collect_report(Workspace(workspace), metrics=("APs",))
    assert {row.summaries["APs"].mean for row in report.rows} == {0.125}
    with pytest.raises(ConfigError, match="--metric APx: not measured by plain-f1-val; there are: AP, AP50, APs"):
        collect_report(Workspace(workspace), metrics=("APx",))


def test_what_is_no_number_is_no_metric(workspace: Path) -> None:
    for manifest in workspace.glob("evaluate/*/manifest.json"):
        content = json.loads(manifest.read_text())
        content["result"]["weights"] = "best"
        manifest.write_text(json.dumps(content))
    said = aligndet("report", "-w", workspace, "--metric", "weights", code=2).error_line()
    assert "--metric weights: not measured by" in said


def test_a_metric_of_some_evaluations_alone(workspace: Path) -> None:
    """Masks are measured of Mask R-CNN, and not of the detectors beside it."""
    add_evaluated(workspace, Tuned("masks", detector="mask-rcnn"), 0.4)
    (workspace / "evaluate" / "masks-val" / "metrics.json").write_text(json.dumps({"AP": 0.4, "mask_AP": 0.35}))
    report = collect_report(Workspace(workspace), metrics=("AP", "mask_AP"))
    assert [row.setting.detector for row in report.rows if "mask_AP" in row.summaries] == ["mask-rcnn"]
    assert all("AP" in row.summaries for row in report.rows)
    assert report.remarks == ["mask_AP: not measured by 6 of 7 evaluations, first plain-f1-val"]
    ran = aligndet("report", "-w", workspace, "--metric", "mask_AP")
    assert "35.0" in ran.stdout and report.remarks[0] in ran.stdout


def test_formats_of_the_command(workspace: Path, tmp_path: Path) -> None:
    words = ("report", "-w", workspace)
    *table, empty, said = aligndet(*words).stdout.splitlines()
    assert [line.split()[0] for line in table] == ["detector", "retinanet", "AlignDet", "retinanet"]
    assert "8.5 ± 0.7" in table[1] and "+0.8 ± 1.2" in table[2] and "1 of 2" in table[2]
    # Half the width of the interval is 12.706 standard errors of two pairs.
    doubtful = "2 pairs: 95 % interval -15.1 to +16.6, ahead in 1 of 2. It could be chance."
    assert (empty, said) == ("", f"AlignDet +0.8 ± 1.2 AP over backbone only, {doubtful}")
    markdown = aligndet(*words, "--format", "markdown", "--metric", "AP").stdout.splitlines()
    assert markdown[0] == (
        "| detector | backbone | schedule | data | labelled | start | n | AP | Δ AP | wins | paper | remark |"
    )
    assert markdown[3] == (
        "| retinanet | resnet50 | 12000 steps | coco | 1 % (1172) | AlignDet | 3 | 9.8 ± 1.3 | +0.8 ± 1.2 | 1 of 2 "
        "|  | 1 of 3 without a baseline run of the same fold and seed |"
    )
    file = tmp_path / "report.csv"
    aligndet(*words, "--format", "csv", "--output", file)
    header, first, *_ = (line.split(",") for line in file.read_text().splitlines())
    assert float(first[header.index("AP_mean")]) == pytest.approx(0.085) and len(first) == len(header)
    found = aligndet(*words, "--json").json()
    assert found["headline"] == said
    assert [row["label"] for row in found["rows"]] == ["backbone only", "AlignDet", "backbone only"]
    assert aligndet(*words, "--format", "json").json() == found


@pytest.mark.parametrize("width", [66, 80, 100])
def test_a_narrow_terminal_has_all_numbers(workspace: Path, width: int) -> None:
    report = collect_report(Workspace(workspace))
    wide = table_lines(report, None)
    assert table_lines(report, max(map(len, wide))) == wide
    narrow = table_lines(report, width)
    assert narrow != wide and max(map(len, narrow)) <= width
    cells = [cell for line in wide for cell in re.split(r"  +", line)]
    told = re.sub(r"\s+", " ", " ".join(narrow))
    numbers = [cell for cell in cells if re.fullmatch(r"[+-]?\d+\.\d( ± \d+\.\d)?|\d of \d", cell)]
    assert {"8.5 ± 0.7", "+0.8 ± 1.2", "1 of 2", "36.3"} <= set(numbers)
    assert [cell for cell in numbers if cell not in told] == []
    for text in (
        "retinanet, resnet50, 12000 steps, on coco, 1 % (1172) labelled",
        "backbone only: 1 fewer than others",
    ):
        assert text in told


def test_mistakes_are_one_line(workspace: Path, tmp_path: Path) -> None:
    words = ("report", "-w", workspace)
    said = aligndet(*words, "--baseline", "backbone", code=2).error_line()
    assert said == "error: --baseline backbone: no start of that name; did you mean 'backbone only'?"
    assert (
        "--format tablx: is not a choice; did you mean 'table'?" in aligndet(*words, "--format", "tablx", code=2).stderr
    )
    assert aligndet("report", "-w", tmp_path / "empty").stdout.startswith("nothing was evaluated here yet")
    assert aligndet("report", "-w", tmp_path / "empty", "--format", "csv").stdout.count("\n") == 1  # the header
    assert "--json and --format csv exclude" in aligndet(*words, "--json", "--format", "csv", code=2).error_line()
    file = tmp_path / "report.json"
    assert aligndet(*words, "--json", "-o", file).json()["file"] == str(file)
    assert json.loads(file.read_text()) == aligndet(*words, "--json").json()
    assert "--metric : not measured by" in aligndet(*words, "--metric", "", code=2).error_line()
