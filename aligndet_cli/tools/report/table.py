"""Reports as tables for the terminal, in Markdown, or as CSV."""

import csv
import io
import sys
from collections.abc import Sequence
from itertools import groupby
from textwrap import wrap

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aligndet_cli.data.splits import split_meaning
from aligndet_cli.tables import percent, plain_table
from aligndet_cli.tools.report.collect import Report, Row, Summary, headline
from aligndet_cli.tools.report.cost import Cost
from aligndet_cli.tools.report.measured import Setting

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
    width = Console().width if sys.stdout.isatty() else None
    said = [text for text in (headline(report), *report.remarks) if text]
    if width is not None:
        said = [line for text in said for line in wrap(text, width)]
    return "\n".join([*table_lines(report, width), "", *said])


def table_lines(report: Report, width: int | None) -> list[str]:
    """Return one table, or where a terminal has not so many columns of text a small one for each setting."""
    lines = _lines_of(terminal_table(report), _ANY_WIDTH)
    if width is None or max(map(cell_len, lines)) <= width:
        return lines
    blocks = [_block(setting, list(rows), width) for setting, rows in groupby(report.rows, lambda row: row.setting)]
    return [line for number, block in enumerate(blocks) for line in (*([""] if number else []), *block)]


def _lines_of(table: Table, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def _block(setting: Setting, rows: Sequence[Row], width: int) -> list[str]:
    """Return a setting in words, a line for each start and metric, and the remarks on starts."""
    header = ("start", "n", "metric", "", "Δ", "wins", "paper")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        numbers = [(name, *shown(summary)) for name, summary in row.summaries.items()]
        numbers += [(name, text, "", "", "") for name, text in zip(_COST_TITLES, _costs(row), strict=True) if text]
        names = [(row.label, str(len(row.runs))), *[("", "")] * len(numbers)]
        lines += [(*name, *number) for name, number in zip(names, numbers or [("", "", "", "", "")], strict=False)]
    kept = [place for place in range(len(header)) if any(line[place] for line in lines)]
    table = plain_table(*(header[place] for place in kept))
    for line in lines:
        table.add_row(*(escape(line[place]) for place in kept))
    told = ", ".join(in_words(title, text) for title, text in zip(SETTING_COLUMNS, setting_cells(setting), strict=True))
    remarks = [f"{row.label}: {_told_about(row)}" for row in rows if _told_about(row)]
    return [*wrap(told, width), *_lines_of(table, width), *(line for text in remarks for line in wrap(text, width))]


SETTING_COLUMNS = ("detector", "backbone", "schedule", "data", "labelled")
NUM_SETTING = len(SETTING_COLUMNS)
_COST_TITLES = ("images seen", "hours", "fine-tuning hours")
_ANY_WIDTH = 1000
_FORMS = {"data": "on {}", "labelled": "{} labelled"}


def in_words(title: str, text: str) -> str:
    """Return a cell of `SETTING_COLUMNS` as a part of a sentence."""
    return _FORMS.get(title, "{}").format(text)


def cells_of(report: Report) -> list[list[str]]:
    """Return header and lines of the table; columns without any text are left out."""
    metric_columns = [title for metric in report.metrics for title in (metric, f"Δ {metric}", "wins", "paper")]
    header = [*SETTING_COLUMNS, "start", "n", *metric_columns, *_COST_TITLES, "remark"]
    lines = [_line(row, report.metrics) for row in report.rows]
    kept = [place for place in range(len(header)) if place <= NUM_SETTING + 1 or any(line[place] for line in lines)]
    return [[line[place] for place in kept] for line in [header, *lines]]


def setting_cells(setting: Setting) -> list[str]:
    """Return the texts of `SETTING_COLUMNS`."""
    is_usual = split_meaning(setting.evaluated) == "val"
    data = setting.data if is_usual else f"{setting.data}, {setting.evaluated}"
    labelled = f"{setting.fraction:g} % ({setting.num_images})" if setting.num_images else "unknown"
    return [setting.detector, setting.backbone, setting.schedule, data, labelled]


def _line(row: Row, metrics: tuple[str, ...]) -> list[str]:
    cells = [*setting_cells(row.setting), row.label, str(len(row.runs))]
    for metric in metrics:
        cells += shown(row.summaries.get(metric))
    return [*cells, *_costs(row), _told_about(row)]


def _told_about(row: Row) -> str:
    source = f"paper: {row.published_in}" if row.published_in else ""
    return "; ".join(part for part in (row.remark, source) if part)


def _costs(row: Row) -> tuple[str, str, str]:
    return *_shown_cost(row.cost), _shown_cost(row.tuning_cost)[1]


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
