"""Comparison of the evaluated runs of a workspace: means, spreads, and paired differences."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from aligndet_cli.artifacts.starts import find_starts, measured_run
from aligndet_cli.errors import ConfigError, did_you_mean
from aligndet_cli.tables import percent
from aligndet_cli.tools.report.cost import Cost, cost_of, mean_cost
from aligndet_cli.tools.report.measured import Measured, Setting, measure, set_apart
from aligndet_cli.tools.report.numbers import check_measured
from aligndet_cli.tools.report.paired import Delta, delta_of, mean_and_std
from aligndet_cli.workspace import Artifact, Workspace

METRICS = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class Summary:
    """A metric over the runs of a row.

    Attributes:
        std: sample standard deviation; None with a single run.
        delta: None for the baseline and without pairs.
        published: the paper's number, if the setting is the paper's.
    """

    mean: float
    std: float | None
    count: int
    delta: Delta | None
    published: float | None


@dataclass(frozen=True)
class Row:
    """Runs of one start in one setting.

    Attributes:
        kind, colour: see `Start`.
        cost: of its pre-training, if asked for and known.
        tuning_cost: of its fine-tuning, likewise.
    """

    setting: Setting
    label: str
    kind: str
    colour: str
    is_baseline: bool
    summaries: dict[str, Summary]
    published_in: str | None
    remark: str
    runs: tuple[str, ...]
    cost: Cost | None = None
    tuning_cost: Cost | None = None


@dataclass(frozen=True)
class Report:
    """Rows by setting, the baseline first, and remarks on runs that were left out.

    Attributes:
        answer: headline in place of the usual one, of a study that asked a question.
    """

    rows: list[Row]
    metrics: tuple[str, ...]
    remarks: list[str] = field(default_factory=list)
    answer: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [asdict(row) for row in self.rows]
        return {"headline": headline(self), "metrics": list(self.metrics), "rows": rows, "remarks": self.remarks}


def headline(report: Report) -> str:
    """Return one sentence that says what came out, or nothing if nothing was measured.

    It is about the first metric, and about the pre-trained start, or another that can be compared: of several, the one
    with the most pairs.
    """
    if report.answer:
        return report.answer
    metric = report.metrics[0]
    bases = {row.setting: row.label for row in report.rows if row.is_baseline}
    compared = [row for row in report.rows if metric in row.summaries and row.summaries[metric].delta is not None]
    deltas: dict[tuple[str, str], list[Delta]] = {}
    for row in [row for row in compared if row.kind == "pretrain"] or compared:
        delta = row.summaries[metric].delta
        assert delta is not None
        deltas.setdefault((row.label, bases[row.setting]), []).append(delta)
    if not deltas:
        return _without_pairs(report.rows, metric)
    names = max(deltas, key=lambda names: sum(delta.num_pairs for delta in deltas[names]))
    return _sentence(deltas[names], metric, *names)


def _without_pairs(rows: Sequence[Row], metric: str) -> str:
    means = [row.summaries[metric].mean for row in rows if metric in row.summaries]
    labels = list(dict.fromkeys(row.label for row in rows if metric in row.summaries))
    if not means:
        return f"{metric} could be measured in no run." if rows else ""
    told = " to ".join(dict.fromkeys(percent(bound(means)) for bound in (min, max))) + f" {metric}"
    if len(labels) == 1:
        return f"{labels[0]}: {told}, and no other start to compare it with."
    none = "none has a run of the baseline with its setting, fold and seed to compare it with"
    return f"{len(labels)} starts of {told}, and {none}."


def _sentence(deltas: Sequence[Delta], metric: str, label: str, base: str) -> str:
    wins, pairs = sum(delta.wins for delta in deltas), sum(delta.num_pairs for delta in deltas)
    if len(deltas) > 1:
        least, most = (percent(bound(delta.mean for delta in deltas), "+") for bound in (min, max))
        ahead = f"ahead in {wins} of {pairs} pairs"
        gain = least if least == most else f"{least} to {most}"
        return f"{label} {gain} {metric} over {base} in {len(deltas)} settings, {ahead}."
    [delta] = deltas
    gain = f"{label} {percent(delta.mean, '+')}"
    if delta.interval is None or delta.standard_error is None:
        told = "a sign, not proof" if delta.mean else "no difference"
        return f"{gain} {metric} over {base}, 1 pair: {told}."
    low, high = delta.interval
    doubt = " It could be chance." if low <= 0 <= high else ""
    return (
        f"{gain} ± {percent(delta.standard_error)} {metric} over {base}, {pairs} pairs: 95 % interval "
        f"{percent(low, '+')} to {percent(high, '+')}, ahead in {wins} of {pairs}.{doubt}"
    )


def collect_report(
    workspace: Workspace,
    *,
    baseline: str | None = None,
    metrics: Sequence[str] = METRICS,
    names: Iterable[str] | None = None,
    with_costs: bool = False,
) -> Report:
    """Compare everything that was evaluated in a workspace.

    Args:
        baseline: label of the start to compare with; None: the backbone alone if there is such a run, else scratch.
        metrics: names in `metrics.json`, such as `mask_AP` or `AP07`.
        names: evaluations to take; None: all.
        with_costs: also tell the costs of pre-training and fine-tuning.

    Raises:
        ConfigError: no evaluation has such a metric.
    """
    measured, remarks = _measure(workspace, metrics, None if names is None else set(names))
    rows: list[Row] = []
    for setting in sorted({run.setting for run in measured}):
        runs = [run for run in measured if run.setting == setting]
        found = _rows_of(setting, runs, baseline, metrics)
        rows += [_with_costs(row, runs) for row in found] if with_costs else found
    return Report(rows, tuple(metrics), remarks)


def _with_costs(row: Row, runs: list[Measured]) -> Row:
    """Return a row with the mean costs of its pre-trainings and of its fine-tunings, each counted once."""

    def mean(used: Iterable[Artifact | None]) -> Cost | None:
        return mean_cost(cost_of(one) for one in {one.folder: one for one in used if one is not None}.values())

    own = [run for run in runs if run.name in row.runs]
    return replace(row, cost=mean(run.pretraining for run in own), tuning_cost=mean(run.tuned for run in own))


def check_baseline(report: Report, baseline: str | None) -> None:
    """Make sure that the report has the start to compare with.

    Raises:
        ConfigError: it does not.
    """
    labels = list(dict.fromkeys(row.label for row in report.rows))
    if baseline is not None and labels and baseline not in labels:
        raise ConfigError(f"--baseline {baseline}: no start of that name{did_you_mean(baseline, labels)}")


def _rows_of(setting: Setting, runs: list[Measured], baseline: str | None, metrics: Sequence[str]) -> list[Row]:
    by_label: dict[str, dict[tuple[int | None, int], Measured]] = {}
    for run in runs:  # oldest first: of two with the same fold and seed the newer one counts
        by_label.setdefault(run.start.label, {})[run.pair] = run
    base = _baseline_of(runs, baseline)
    labels = sorted(by_label, key=lambda label: label != base)
    most = max(map(len, by_label.values()))
    rows = []
    for label in labels:
        own = by_label[label]
        others = by_label[base] if base is not None and label != base else None
        published = {run.published for run in own.values()}
        one = published.pop() if len(published) == 1 else None  # the runs of a row may be of several experiments
        numbers, table = (one.numbers, one.source) if one is not None else ({}, None)
        found = {metric: _summary(own, others, metric, numbers.get(metric)) for metric in metrics}
        summaries = {metric: summary for metric, summary in found.items() if summary is not None}
        num_all = sum(run.start.label == label for run in runs)
        remark = _remark(own, others, missing=most - len(own), num_older=num_all - len(own))
        names = tuple(run.name for run in own.values())
        start = next(iter(own.values())).start
        rows.append(Row(setting, label, start.kind, start.colour, label == base, summaries, table, remark, names))
    return rows


def _baseline_of(runs: list[Measured], asked: str | None) -> str | None:
    """Return the label to compare with in one setting, or None."""
    labels = {run.start.label for run in runs}
    if asked is not None:
        return asked if asked in labels else None
    for kind in ("backbone", "scratch"):
        plain = [run.start for run in runs if run.start.kind == kind]
        if plain:
            return next((start.label for start in plain if not start.is_labelled), plain[0].label)
    return None


def _summary(
    own: dict[tuple[int | None, int], Measured],
    others: dict[tuple[int | None, int], Measured] | None,
    metric: str,
    published: float | None,
) -> Summary | None:
    values = {pair: value for pair, run in own.items() if (value := run.numbers.get(metric)) is not None}
    if not values:
        return None
    other_values = {pair: run.numbers.get(metric) for pair, run in (others or {}).items()}
    differences = [value - other for pair, value in values.items() if (other := other_values.get(pair)) is not None]
    mean, std = mean_and_std(list(values.values()))
    return Summary(mean, std, len(values), delta_of(differences) if differences else None, published)


def _remark(own: dict[Any, Measured], others: dict[Any, Measured] | None, *, missing: int, num_older: int) -> str:
    remarks = []
    if missing:
        remarks.append(f"{missing} fewer than others")
    if others is not None and (unpaired := len(own.keys() - others.keys())):
        remarks.append(f"{unpaired} of {len(own)} without a baseline run of the same fold and seed")
    if num_older:
        remarks.append(f"{num_older} older of the same fold and seed left out")
    return "; ".join(remarks)


def _measure(workspace: Workspace, metrics: Sequence[str], names: set[str] | None) -> tuple[list[Measured], list[str]]:
    """Return all evaluated runs, oldest first, and remarks on runs that were left out."""
    tuned = workspace.artifacts("finetune")
    pretrained = {artifact.content_hash: artifact for artifact in workspace.artifacts("pretrain-box")}
    starts = find_starts(workspace)
    found: dict[str, Measured] = {}
    gone = []
    for evaluation in workspace.artifacts("evaluate"):
        if names is not None and evaluation.name not in names:
            continue
        run = measured_run(evaluation, tuned)
        if run is None:
            gone.append(evaluation.name)
            continue
        pretraining = pretrained.get(run.manifest["inputs"]["weights"])
        found[evaluation.name] = measure(evaluation, run, starts[run.name], pretraining, metrics)
    remarks = [f"left out, the run they measured is gone or was made anew: {', '.join(gone)}"] if gone else []
    remarks += check_measured({name: run.numbers for name, run in found.items()}, metrics, workspace)
    return set_apart(list(found.values())), remarks
