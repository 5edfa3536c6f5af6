"""Pairs of name patterns that rename tensors one way and the other."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# (their pattern, our pattern): `#` stands for a number and `*` for the rest; the first that fits is used.
Rule = tuple[str, str]


@dataclass(frozen=True)
class Renamed:
    """A detector of another program under our names.

    Attributes:
        unknown: their names of tensors that ours has not.
        left_out: names of tensors that are no weights, and why.
        detector, backbone: settings that names and shapes do not tell.
    """

    family: str
    tensors: dict[str, Tensor]
    unknown: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    detector: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)


def rename_all(
    tensors: Mapping[str, Tensor], rules: Sequence[Rule], ignored: Iterable[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names of those that no rule fits, without the ignored ones."""
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name in [name for name in tensors if name not in set(ignored)]:
        ours = rename(name, rules, to_ours=True)
        if ours is None:
            unknown.append(name)
        else:
            renamed[ours] = tensors[name]
    return renamed, sorted(unknown)


def rename(name: str, rules: Sequence[Rule], *, to_ours: bool) -> str | None:
    """The name on the other side; None where no rule fits."""
    for theirs, ours in rules:
        source, target = (theirs, ours) if to_ours else (ours, theirs)
        match = _compiled(source).fullmatch(name)
        if match is not None:
            return _filled(target, match.groups())
    return None


def _filled(pattern: str, parts: Sequence[str]) -> str:
    left = iter(parts)
    return re.sub(r"[#*]", lambda _: next(left), pattern)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))
