"""Short sides of images, one of which is drawn, and ranges of them: `400..1400` stands for all from 400 to 1400."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from aligndet_cli.config import MIN_SIDE, Side

_LARGEST_RANGE = 10_000  # sides


def fold_sides(sides: Sequence[int]) -> list[int | str]:
    """Return sides with each run of three or more pixels in a row as a text, `400..1400`."""
    folded: list[int | str] = []
    ends = [place for place, side in enumerate(sides) if side + 1 not in sides[place + 1 : place + 2]]
    for start, end in zip([0, *(place + 1 for place in ends)], ends, strict=False):
        run = list(sides[start : end + 1])
        folded += [f"{run[0]}..{run[-1]}"] if len(run) > 2 else run
    return folded


def show_sides(sides: Sequence[int]) -> str:
    """Return sides for people: a list, in which a range is not written out."""
    return f"[{', '.join(map(str, fold_sides(sides)))}]"


def show_limits(short_sides: Sequence[int], long_side: int) -> str:
    """Return the sides that images are resized to for people, with those that the long side overrules."""
    told = f"short side {show_sides(short_sides)}, long side {long_side}"
    cut = [side for side in short_sides if side > long_side]
    if not cut:
        return told
    which = "every short side is" if len(cut) == len(short_sides) else f"{show_sides(cut)} are"
    return f"{told} ({which} above it, so the long side alone decides; --short-side sets smaller ones)"


def _unfold_sides(given: Any) -> Any:
    """Return all sides of a list with ranges, or of a range alone; anything else as it is."""
    found: list[Any] = []
    for part in given if isinstance(given, list | tuple) else [given] if isinstance(given, str) else ():
        match = re.fullmatch(r"(\d+)\.\.(\d+)", part) if isinstance(part, str) else None
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if match and not 0 <= last - first < _LARGEST_RANGE:
            raise ValueError(f"{part}: write the smaller side first, and no more than {_LARGEST_RANGE} of them")
        if match and first < MIN_SIDE:
            raise ValueError(f"{part}: a side should be {MIN_SIDE} or more")
        if isinstance(part, str) and not match and re.search(r"\.\.|\d\s*-", part):
            raise ValueError(f"{part!r}: write a side in pixels, or a range of sides such as 400..1400")
        found += range(first, last + 1) if match else [part]
    return tuple(found) if found else given


Sides = Annotated[
    tuple[Side, ...],
    Field(min_length=1),
    BeforeValidator(_unfold_sides),
    PlainSerializer(fold_sides, return_type=list[int | str], when_used="json"),
]
