from dataclasses import replace
from pathlib import Path

import pytest

from aligndet_cli.tools.report.collect import collect_report
from aligndet_cli.tools.study.quick.verdict import Verdict, verdicts_of
from aligndet_cli.workspace import Workspace
from helpers.reports import Tuned, add_evaluated


def judged(folder: Path, pairs: list[tuple[float, float]]) -> list[Verdict]:
    for seed, (plain, ours) in enumerate(pairs):
        share = {"seed": seed, "images": 131, "steps": 300}
        add_evaluated(folder, Tuned(f"plain-{seed}", label="backbone only, lr 0.02", **share), plain)
        add_evaluated(folder, Tuned(f"ours-{seed}", "pretrain", "AlignDet", weights="own", **share), ours)
    return verdicts_of(collect_report(Workspace(folder), baseline="backbone only, lr 0.02"), "AlignDet")


def test_the_interval_is_students_over_pairs(tmp_path: Path) -> None:
    (verdict,) = judged(tmp_path, [(0.30, 0.32), (0.31, 0.34), (0.30, 0.325)])
    # differences of 2, 3 and 2.5: mean 2.5, deviation 0.5, error 0.5 / sqrt(3) = 0.2887; t(0.975, 2) = 4.3027
    assert verdict.difference == pytest.approx(0.025)
    assert (verdict.low, verdict.high) == pytest.approx((0.025 - 0.012421, 0.025 + 0.012421), abs=1e-6)
    assert verdict.sentence() == (
        "With all 131 labelled images: +2.5 AP, 95 % between +1.3 and +3.7, 3 pairs against backbone only, lr 0.02: "
        "it pays."
    )
    assert verdict.to_json()["answer"] == "it pays"
    part = replace(verdict, fraction=20.0, labelled=26)
    assert part.sentence().startswith("With 26 (20 %) labelled images: +2.5 AP")


@pytest.mark.parametrize(
    ("pairs", "answer"),
    [
        ([(0.30, 0.28), (0.31, 0.29), (0.30, 0.285)], "it does not pay"),
        ([(0.30, 0.301), (0.31, 0.309), (0.30, 0.3)], "it does not pay"),  # not even half a point
        ([(0.30, 0.32), (0.31, 0.30), (0.30, 0.33)], "not decided: more seeds or labels"),
        ([(0.001, 0.01), (0.002, 0.012), (0.001, 0.011)], "not decided: no detector has learned to detect (AP 0.1)"),
    ],
)
def test_answers(tmp_path: Path, pairs: list[tuple[float, float]], answer: str) -> None:
    (verdict,) = judged(tmp_path, pairs)
    assert f": {answer}" in verdict.sentence()


def test_one_pair_is_no_verdict(tmp_path: Path) -> None:
    assert judged(tmp_path, [(0.3, 0.4)]) == []
