"""Tables for a terminal."""

from rich.table import Table


def plain_table(*columns: str) -> Table:
    """Return an empty table in the one style of this package."""
    return Table(*columns, box=None, header_style="bold", padding=(0, 2, 0, 0))
