"""Pairs of name patterns that rename tensors one way and the other."""

import functools
import re
from collections.abc import Sequence

# (their pattern, our pattern): `#` stands for a number and `*` for the rest; the first that fits is used.
Rule = tuple[str, str]


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
