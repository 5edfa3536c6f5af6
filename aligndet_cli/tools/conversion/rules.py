"""Pairs of name patterns, to rename tensors from another program's names to ours and back."""

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from aligndet_cli.backbones import WeightsTraining
from aligndet_cli.training.recipe import RecipeName

_Value = TypeVar("_Value")

# (their pattern, our pattern): `#` stands for a number and `*` for the rest; the first rule that fits is used.
Rule = tuple[str, str]


@dataclass(frozen=True)
class Pretraining:
    """Pre-training by another method than AlignDet's.

    Attributes:
        backbone: what the weights of the backbone count as.
        recipe: of fine-tuning; None: by detector and backbone.
        absent: modules of the detector that it does not have.
        epochs: its length; None if the file does not tell.
    """

    backbone: WeightsTraining
    recipe: RecipeName | None = None
    absent: tuple[str, ...] = ()
    epochs: int | None = None


@dataclass(frozen=True)
class Renamed:
    """A detector of another program under our names.

    Attributes:
        unknown: their names of tensors that our detectors do not have.
        left_out: reasons by their names, of tensors that are no weights.
        detector, backbone: settings that do not follow from names and shapes.
        untold: message on settings that do not follow from anything in the file; "" if there are none.
        pretraining: None for detectors with classes, and for AlignDet's, which their tensors tell.
    """

    family: str
    tensors: dict[str, Tensor]
    unknown: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    detector: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    untold: str = ""
    pretraining: Pretraining | None = None


def value_of_mark(names: Collection[str], marks: Mapping[str, _Value]) -> _Value | None:
    """Return the value of the first mark that any of the names begins with; None if no name does."""
    return next((value for mark, value in marks.items() if any(name.startswith(mark) for name in names)), None)


def reasons_by_start(names: Iterable[str], reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the reason of each name that begins with one of the starts; names with none are left out."""
    return {name: why for name in names for start, why in reasons.items() if name.startswith(start)}


def rename_all(
    tensors: Mapping[str, Tensor], rules: Sequence[Rule], ignored: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict under our names, and the sorted names that no rule fits; ignored names are in neither."""
    our_names = {name: translate(name, rules, to_ours=True) for name in tensors if name not in ignored}
    renamed = {ours: tensors[name] for name, ours in our_names.items() if ours is not None}
    return renamed, sorted(name for name, ours in our_names.items() if ours is None)


def translate(name: str, rules: Sequence[Rule], *, to_ours: bool) -> str | None:
    """Return the other program's name for one of ours, or the reverse; None if no rule fits."""
    for theirs, ours in rules:
        source, target = (theirs, ours) if to_ours else (ours, theirs)
        match = _compiled(source).fullmatch(name)
        if match is not None:
            return re.sub(r"[#*]", "{}", target).format(*match.groups())
    return None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))
