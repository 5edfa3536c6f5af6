"""`aligndet study --quick`: from a data set to a verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aligndet_cli.config import validated
from aligndet_cli.errors import ConfigError
from aligndet_cli.logs import logger
from aligndet_cli.processes.launch import Shown
from aligndet_cli.tools.report.collect import Report
from aligndet_cli.tools.report.html import write_page
from aligndet_cli.tools.study.command import StudyOutcome, list_runs, refuse_joining, run_study
from aligndet_cli.tools.study.quick.backbone import find_backbone
from aligndet_cli.tools.study.quick.budget import Costs, Size, choose_size
from aligndet_cli.tools.study.quick.data import LabelledData, open_labelled
from aligndet_cli.tools.study.quick.fit import PROPOSAL_IMAGES, TOPK, Tables, fit_settings, is_gpu, rates_of
from aligndet_cli.tools.study.quick.plan import OURS, Asked, PlanFiles, QuickPlan, Search, content_of, label_of
from aligndet_cli.tools.study.quick.timing import time_stages
from aligndet_cli.tools.study.quick.verdict import Verdict, verdicts_of
from aligndet_cli.tools.study.spec import StudyConfig
from aligndet_cli.workspace import Workspace

DETECTOR = "retinanet"
HOURS = 1.0


@dataclass(frozen=True)
class QuickOutcome:
    """The outcome of a quick study.

    Attributes:
        study: of its runs.
        page: None after a dry run.
    """

    plan: QuickPlan
    file: Path
    study: StudyOutcome
    verdicts: list[Verdict] = field(default_factory=list)
    page: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **self.study.to_json(),
            "plan": {**self.plan.lines, "seconds": round(self.plan.seconds)},
            "study": str(self.file),
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "page": self.page and str(self.page),
        }


def ask(
    data: Path,
    *,
    hours: float = HOURS,
    detector: str | None = None,
    backbone: str | None = None,
    backbone_weights: str | None = None,
) -> Asked:
    """Return what was typed as a question, with files by their whole path.

    Raises:
        ConfigError: no time.
    """
    if not hours > 0 or math.isinf(hours):
        raise ConfigError(f"--hours {hours:g}: should be greater than 0")
    weights = backbone_weights
    if weights is not None and Path(weights).is_file():
        weights = str(Path(weights).absolute())
    return Asked(str(data.absolute()), hours, detector, backbone, weights)


def run_quick(
    asked: Asked,
    workspace: Workspace,
    *,
    jobs: int | None = None,
    dry_run: bool = False,
    offline: bool = False,
    shown: Shown | None = None,
) -> QuickOutcome:
    """Plan a study for a data set and the time there is, run it, and tell whether pre-training pays.

    The same call goes on with the plan it has made. A dry run measures and plans, and writes nothing.

    Raises:
        ConfigError: too little time, or a plan of something else is there.
        DataError: no labelled images.
        WeightsError: no weights of a backbone.
        Preempted, KeyboardInterrupt: asked to stop.
    """
    refuse_joining()
    files = PlanFiles(workspace)
    known = files.read(asked)
    plan = known[0] if known else _make_plan(asked, files, workspace, jobs=jobs or 1, offline=offline)
    search = known[1] if known else Search(plan.rates)
    width = max(map(len, plan.lines))
    for title, line in plan.lines.items():
        logger.info(f"  {title:<{width}}  {line}")
    if dry_run:
        return QuickOutcome(plan, files.study, list_runs(validated(StudyConfig, plan.study(search), {}), workspace))
    if known is None:
        open_labelled(Path(asked.data)).write_held_out(files.held_out)
        files.write(plan, search)
        logger.info(f"the plan is {files.study}; stopped, the same command goes on with it")
    outcome = run_study(files.study, workspace, jobs=jobs, shown=shown, expected=plan.expected)
    while search.best is None and outcome.failure is None and outcome.report is not None:
        search = search.after(_measured(outcome.report, search.rates, asked))
        if search.best is not None:
            logger.info(f"best: {label_of(search.best)}; now AlignDet, and the other seeds")
        files.write(plan, search)
        outcome = run_study(files.study, workspace, jobs=jobs, shown=shown, expected=plan.expected)
    assert outcome.report is not None, "a study that ran has a report"
    verdicts = verdicts_of(outcome.report, OURS) if search.best is not None and outcome.failure is None else []
    report = replace(outcome.report, answer=" ".join(one.sentence() for one in verdicts))
    page = write_page(workspace, report) if report.rows else None
    return QuickOutcome(plan, files.study, replace(outcome, report=report), verdicts, page)


def _make_plan(asked: Asked, files: PlanFiles, workspace: Workspace, *, jobs: int, offline: bool) -> QuickPlan:
    detector = asked.detector or DETECTOR
    rates = rates_of(detector).plain
    data = open_labelled(Path(asked.data))
    name, weights = find_backbone(asked.backbone, asked.weights, workspace, offline=offline, is_gpu=is_gpu())
    tables = fit_settings(data, detector, name, weights)
    logger.info("measuring: a few real steps of every stage on this machine, which takes about a minute")
    costs = time_stages(content_of(data.root, detector, Size((100,), 1, 1, 1, 1), tables), data)
    num_proposal_images = min(data.num_train, PROPOSAL_IMAGES)
    size, seconds = choose_size(
        costs,
        3600 * asked.hours,
        num_images=data.num_train,
        num_proposal_images=num_proposal_images,
        num_rates=len(rates) + 1,  # one beyond
        jobs=jobs if is_gpu() else 1,
    )
    for table, added in data.held_out_settings(files.held_out).items():
        tables[table] = {**tables.get(table, {}), **added}
    expected = size.expected(costs, num_proposal_images=num_proposal_images)
    lines = _describe(data, detector, tables, size, costs, expected)
    lines["in all"] = f"about {_time(seconds)}"
    content = content_of(data.root, detector, size, tables)
    return QuickPlan(asked, lines, seconds, expected, content, rates, size.rate_seeds)


def _describe(
    data: LabelledData, detector: str, tables: Tables, size: Size, costs: Costs, expected: Mapping[str, float]
) -> dict[str, str]:
    common, tuned = tables["common"], tables["finetune"]
    rates = rates_of(detector).plain
    runs = size.num_finetunings(len(rates) + 1)
    labels = " and ".join(f"{percent:g} %" for percent in size.fractions)
    tried = "seed 0" if size.rate_seeds == 1 else f"{size.rate_seeds} seeds"
    tuning = runs * (expected["finetune"] + expected["evaluate"])
    return {
        "data": data.describe(),
        "detector": f"{detector} on {common['backbone.name']}, weights {common['backbone.weights']}",
        "images": f"short side {tuned['resolution.short_side'][0]}, long side {tuned['resolution.long_side']} at most, "
        f"{common['training.batch_size']} a step, {common['runtime.precision']}",
        "proposals": f"{min(data.num_train, PROPOSAL_IMAGES)} images without their labels: "
        f"{_time(expected['proposals'])}",
        "pre-training": f"{size.pretrain_steps} steps of {costs.pretrain_step:.2f} s, {TOPK} proposals an image: "
        f"{_time(expected['pretrain-box'])}",
        "fine-tuning": f"{runs} runs at most of {size.finetune_steps} steps of {costs.finetune_step:.2f} s, and their "
        f"evaluation: {_time(tuning)}",
        "starts": f"first the backbone only at rates of {', '.join(f'{lr:g}' for lr in rates)}, and beyond if the best "
        f"is at an end, with {tried}; then AlignDet and the best of these, with {labels} of the labels and "
        f"{size.seeds} seeds",
    }


def _measured(report: Report, rates: Sequence[float], asked: Asked) -> dict[float, float]:
    """Return the mean AP, 0 to 1, of the baseline at each rate, and tell it."""
    means = {row.label: row.summaries["AP"].mean for row in report.rows if "AP" in row.summaries}
    found = {rate: means[label_of(rate)] for rate in rates if label_of(rate) in means}
    if not found:
        raise ConfigError(f"{asked.data}: AP of no run can be measured: are there boxes in the images to measure on?")
    logger.info(", ".join(f"{label_of(rate)}: AP {100 * value:.1f}" for rate, value in found.items()))
    return found


def _time(seconds: float) -> str:
    """Return a time for people: rounded up, in seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 5400:
        return f"{-(-seconds // 60):.0f} min"
    return f"{seconds / 3600:.1f} h"
