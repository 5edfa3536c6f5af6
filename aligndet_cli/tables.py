"""Tables and numbers for a terminal."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Column, Table

_AP = re.compile(r"(?:^|[ ._])AP\w*$")  # `AP`, `mask_AP50`, `best.AP`, `VOC AP12`


def plain_table(*columns: str) -> Table:
    """Return an empty table in the one style of this package; what is too long is folded, never cut."""
    named = [Column(name, overflow="fold") for name in columns]
    return Table(*named, box=None, header_style="bold", padding=(0, 2, 0, 0))


def percent(value: float | None, sign: str = "") -> str:
    """Return an AP as people read it, in percent as in papers; files have it from 0 to 1.

    Args:
        sign: `+` for a difference.
    """
    return "not measurable" if value is None else f"{round(100 * value, 1) + 0.0:{sign}.1f}"  # no "-0.0"


def rows_for_people(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield names and texts of a result's numbers, AP in percent; lists and what is not there are left out.

    A `metric` and its `value` become one row, unless the number is there by its own name.
    """
    for name, value in result.items():
        if name == "metric" and "value" in result:
            if str(value).rpartition(" ")[2] not in result:
                yield str(value), percent(result["value"])
        elif isinstance(value, Mapping):
            yield from ((f"{name} {inner}", text) for inner, text in rows_for_people(value))
        elif value is not None and not isinstance(value, list) and not (name == "value" and "metric" in result):
            yield name.replace("_", " "), _text(name, value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return percent(value) if _AP.search(name) else f"{value:.4g}"
