"""Tables for a terminal."""

from rich.markup import escape
from rich.table import Table

from aligndet_cli.data.doctor import DoctorReport
from aligndet_cli.status import StatusRow

_STATE_COLOURS = {"complete": "green", "stale": "yellow", "interrupted": "yellow", "running": "cyan"}
_SEVERITY_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


def plain_table(*columns: str) -> Table:
    """An empty table in the one style of this package."""
    return Table(*columns, box=None, header_style="bold", padding=(0, 2, 0, 0))


def status_table(rows: list[StatusRow]) -> Table:
    """One line per run."""
    table = plain_table("artifact", "state", "made from", "result")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for row in rows:
        state = f"[{_STATE_COLOURS[row.state]}]{row.state}[/]"
        table.add_row(f"{row.stage}/{row.run}", state, "\n".join(row.made_from), escape(row.remark))
    return table


def doctor_table(report: DoctorReport) -> Table:
    """One line per finding."""
    table = plain_table("", "count", "finding", "example")
    for finding in report.findings:
        severity = f"[{_SEVERITY_COLOURS[finding.severity]}]{finding.severity}[/]"
        table.add_row(severity, str(finding.count), escape(finding.message), escape(finding.example))
    return table
