"""Reports as tables for the terminal, in Markdown, or as CSV."""

import csv
import io
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aligndet_cli.tables import percent, plain_table
from aligndet_cli.tools.report.collect import Report, Row, Setting, Summary, headline
from aligndet_cli.tools.report.cost import Cost

FORMATS = ("table", "markdown", "csv", "json")


def terminal_table(report: Report) -> Table:
    """Return a table with one line per start and a rule between settings."""
    header, *lines = cells_of(report)
    table = plain_table(*header)
    for column in table.columns[: NUM_SETTING + 1]:
        column.no_wrap = True
    previous = None
    for row, line in zip(report.rows, lines, strict=True):
        if previous is not None and row.setting != previous:
            table.add_section()
        cells = [escape(cell) for cell in line]
        if row.setting == previous:
            cells[:NUM_SETTING] = [""] * NUM_SETTING
        table.add_row(*cells)
        previous = row.setting
    return table


def markdown(report: Report) -> str:
    """Return a pipe table, and below it what came out and the remarks."""
    header, *lines = cells_of(report)
    marks = ["---" if place < NUM_SETTING + 1 else "---:" for place in range(len(header))]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [header, marks, *lines]]
    return "\n".join([*rows, *(f"\n{remark}" for remark in (headline(report), *report.remarks) if remark)]) + "\n"


COSTS = ("images_seen", "hours", "finetune_hours")


def csv_text(report: Report) -> str:
    """Return one line per start and setting, in full precision, with metrics in 0..1."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("mean", "std", "n", "delta", "delta_standard_error", "wins", "pairs", "published")
    columns = [f"{metric}_{name}" for metric in report.metrics for name in names]
    settings = ("detector", "backbone", "schedule", "data", "evaluated", "fraction", "num_images")
    writer.writerow([*settings, "start", "is_baseline", *columns, *COSTS, "published_in", "remark"])
    for row in report.rows:
        values = [value for metric in report.metrics for value in _values(row.summaries.get(metric))]
        setting = [getattr(row.setting, name) for name in settings]
        costs = (row.cost.images, row.cost.hours) if row.cost else (None, None)
        costs = (*costs, row.tuning_cost and row.tuning_cost.hours)
        writer.writerow([*setting, row.label, row.is_baseline, *values, *costs, row.published_in, row.remark])
    return out.getvalue()


def render(report: Report, form: str) -> str:
    """Return the text of a report as `table`, `markdown` or `csv`."""
    if not report.rows and form != "csv":  # programs expect at least the header of a CSV
        nothing = "nothing was evaluated here yet: run `aligndet evaluate`, or `aligndet study`"
        return "\n".join([nothing, *report.remarks])
    if form != "table":
        return (markdown(report) if form == "markdown" else csv_text(report)).rstrip("\n")
    # As wide as the terminal, or without a terminal as wide as needed.
    console = Console(width=Console().width if sys.stdout.isatty() else 1000, file=io.StringIO())
    with console.capture() as captured:
        console.print(terminal_table(report))
    table = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join([*table, "", *(line for line in (headline(report), *report.remarks) if line)])


SETTING_COLUMNS = ("detector", "backbone", "schedule", "data", "labelled")
NUM_SETTING = len(SETTING_COLUMNS)


def cells_of(report: Report) -> list[list[str]]:
    """Return header and lines of the table; columns without any text are left out."""
    metric_columns = [title for metric in report.metrics for title in (metric, f"Δ {metric}", "wins", "paper")]
    header = [*SETTING_COLUMNS, "start", "n", *metric_columns, "images seen", "hours", "fine-tuning hours", "remark"]
    lines = [_line(row, report.metrics) for row in report.rows]
    kept = [place for place in range(len(header)) if place <= NUM_SETTING + 1 or any(line[place] for line in lines)]
    return [[line[place] for place in kept] for line in [header, *lines]]


def setting_cells(setting: Setting) -> list[str]:
    """Return the texts of `SETTING_COLUMNS`."""
    data = setting.data if setting.evaluated == "val" else f"{setting.data}, {setting.evaluated}"
    labelled = f"{setting.fraction:g} % ({setting.num_images})" if setting.num_images else "unknown"
    return [setting.detector, setting.backbone, setting.schedule, data, labelled]


def _line(row: Row, metrics: tuple[str, ...]) -> list[str]:
    cells = [*setting_cells(row.setting), row.label, str(len(row.runs))]
    for metric in metrics:
        cells += shown(row.summaries.get(metric))
    cells += [*_shown_cost(row.cost), _shown_cost(row.tuning_cost)[1]]
    source = f"paper: {row.published_in}" if row.published_in else ""
    return [*cells, "; ".join(part for part in (row.remark, source) if part)]


def _shown_cost(cost: Cost | None) -> tuple[str, str]:
    """Return the images that a training saw, and its hours."""
    if cost is None:
        return "", ""
    return f"{cost.images:,.0f}", "" if cost.hours is None else f"{cost.hours:.2f}"


def shown(summary: Summary | None) -> tuple[str, str, str, str]:
    """Return value, difference, wins and the paper's number, in percent."""
    if summary is None:
        return "", "", "", ""
    mean = percent(summary.mean) + ("" if summary.std is None else f" ± {percent(summary.std)}")
    published = "" if summary.published is None else percent(summary.published)
    delta = summary.delta
    if delta is None:
        return mean, "", "", published
    error = "" if delta.standard_error is None else f" ± {percent(delta.standard_error)}"
    return mean, f"{percent(delta.mean, '+')}{error}", f"{delta.wins} of {delta.num_pairs}", published


def _values(summary: Summary | None) -> list[float | int | None]:
    if summary is None:
        return [None] * 8
    delta = summary.delta
    paired = [None] * 4 if delta is None else [delta.mean, delta.standard_error, delta.wins, delta.num_pairs]
    return [summary.mean, summary.std, summary.count, *paired, summary.published]
