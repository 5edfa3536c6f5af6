"""The plan of a quick study: an ordinary study file in the workspace, and how it came about."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligndet_cli.errors import ConfigError
from aligndet_cli.files import read_json, refuse_newer, write_bytes, write_json
from aligndet_cli.tools.study.quick.budget import FOLD, Size
from aligndet_cli.tools.study.quick.fit import AFTER_PRETRAINING, Tables
from aligndet_cli.workspace import Workspace

NAME = "quick"  # of the files, and first part of the names of runs
OURS = "AlignDet"
_FORMAT = 1
_MOST_RATES = 5
_NOT_YET = "# AlignDet joins these starts once the best rate of the backbone only is known, at half as much again."


@dataclass(frozen=True)
class Asked:
    """Words of the user; None where nothing was said."""

    data: str
    hours: float
    detector: str | None = None
    backbone: str | None = None
    weights: str | None = None

    def command(self) -> str:
        """Return the command that asks for this."""
        words = ["aligndet study --quick", self.data, f"--hours {self.hours:g}"]
        flags = {"--detector": self.detector, "--backbone": self.backbone, "--backbone-weights": self.weights}
        return " ".join([*words, *(f"{flag} {value}" for flag, value in flags.items() if value is not None)])


@dataclass(frozen=True)
class Search:
    """State of the search for the best learning rate of the baseline.

    Attributes:
        rates: those that are tried, lowest first.
        best: the chosen one; None while they are tried.
    """

    rates: tuple[float, ...]
    best: float | None = None

    def after(self, measured: Mapping[float, float]) -> "Search":
        """Return the next state by the AP of each rate: while the best is at an end, another one is tried beyond it.

        Of equal ones, the best is the one next to the middle.
        """
        middle = (len(self.rates) - 1) / 2
        places = range(len(self.rates))
        best = self.rates[max(places, key=lambda at: (measured.get(self.rates[at], -1.0), -abs(at - middle)))]
        beyond = {self.rates[0]: (best / 2, *self.rates), self.rates[-1]: (*self.rates, best * 2)}.get(best)
        if beyond is None or len(self.rates) >= _MOST_RATES:
            return Search(self.rates, best)
        return Search(beyond)

    def states(self) -> Iterator["Search"]:
        """Yield all states that may follow this one, and itself."""
        for low in range(_MOST_RATES - len(self.rates) + 1):
            for high in range(_MOST_RATES - len(self.rates) + 1 - low):
                below = tuple(self.rates[0] / 2**power for power in range(low, 0, -1))
                above = tuple(self.rates[-1] * 2**power for power in range(1, high + 1))
                rates = (*below, *self.rates, *above)
                yield from (Search(rates, best) for best in (None, *rates))


@dataclass(frozen=True)
class QuickPlan:
    """A plan.

    Attributes:
        lines: what will run and how long it takes, by title, for people.
        seconds: estimate of the whole.
        expected: estimate of a run by stage.
        content: of the study file, without its starts.
        rates: of the baseline, to begin with.
        rate_seeds: number of seeds that rates are compared with.
    """

    asked: Asked
    lines: Mapping[str, str]
    seconds: float
    expected: Mapping[str, float]
    content: Mapping[str, Any]
    rates: tuple[float, ...]
    rate_seeds: int

    def study(self, search: Search) -> dict[str, Any]:
        """Return the content of the study file in a state of the search: once it is over, with AlignDet."""
        part = {"seeds": list(range(self.rate_seeds)), "fractions": [self.content["fractions"][-1]]}
        tried = {rate: _plain(rate, part) for rate in search.rates}
        if search.best is None:
            return {**self.content, "starts": list(tried.values())}
        del tried[search.best]
        return {**self.content, "starts": [_plain(search.best, {}), ours(search.best), *tried.values()]}

    def text(self, search: Search) -> str:
        """Return the study file in a state of the search."""
        told = [f"# {title}: {line}" for title, line in self.lines.items()]
        head = f"# Does box-domain pre-training pay on this data? Planned by\n#   {self.asked.command()}"
        open_end = [] if search.best is not None else [_NOT_YET]
        return "\n".join([head, *told, *open_end, "", *_toml(self.study(search))])


def label_of(rate: float) -> str:
    """Return the label of the baseline at a learning rate."""
    return f"backbone only, lr {rate:g}"


def ours(best: float) -> dict[str, Any]:
    """Return the start with pre-training, by the best learning rate without it."""
    lr = float(f"{best * AFTER_PRETRAINING:g}")
    return {"label": OURS, "init": "pretrain", "finetune": {"training.lr": lr}}


def _plain(rate: float, part: Mapping[str, Any]) -> dict[str, Any]:
    return {"label": label_of(rate), "init": "backbone", **part, "finetune": {"training.lr": rate}}


def content_of(data: Path, detector: str, size: Size, tables: Tables) -> dict[str, Any]:
    """Return the content of a study without its starts."""
    settings = {name: dict(table) for name, table in tables.items()}
    settings["pretrain-box"]["training.steps"] = size.pretrain_steps
    settings["finetune"]["training.steps"] = size.finetune_steps
    return {
        "name": NAME,
        "data": str(data.absolute()),
        "detectors": [detector],
        "fractions": list(size.fractions),
        "folds": [FOLD],
        "seeds": list(range(size.seeds)),
        "settings": settings,
    }


@dataclass(frozen=True)
class PlanFiles:
    """The files of a plan in a workspace: the study, and how it came about."""

    workspace: Workspace

    @property
    def study(self) -> Path:
        """The study file."""
        return self.workspace.root / f"{NAME}.toml"

    @property
    def held_out(self) -> Path:
        """Folder of the labels of images that are held out."""
        return self.workspace.root / NAME

    def read(self, asked: Asked) -> tuple[QuickPlan, Search] | None:
        """Return the plan that was made before and the state of its search; None without a plan.

        Raises:
            ConfigError: the plan is of another question, or its study was changed by hand.
        """
        if not self.study.exists():
            return None
        again = f"run it with `aligndet study {self.study} -w {self.workspace.root}`, or delete it for a new plan"
        record = self.study.with_suffix(".json")
        if not record.exists():
            raise ConfigError(f"{self.study}: is there and is no plan of this command; {again}")
        known = read_json(record)
        refuse_newer(record, known.pop("format"), _FORMAT, ConfigError)
        plan = QuickPlan(**{**known, "asked": Asked(**known["asked"]), "rates": tuple(known["rates"])})
        if plan.asked != asked:
            raise ConfigError(
                f"{self.study}: is the plan of `{plan.asked.command()}`; delete it for another one, or use another "
                "--workspace"
            )
        text = self.study.read_text(encoding="utf-8")
        for search in Search(plan.rates).states():
            if text == plan.text(search):
                return plan, search
        raise ConfigError(f"{self.study}: was changed since it was planned; {again}")

    def write(self, plan: QuickPlan, search: Search) -> None:
        """Write the plan and the study in a state of its search."""
        self.workspace.root.mkdir(parents=True, exist_ok=True)
        known = {"format": _FORMAT, **vars(plan), "asked": vars(plan.asked)}
        write_json(self.study.with_suffix(".json"), known)
        write_bytes(self.study, plan.text(search).encode())


def _toml(content: Mapping[str, Any]) -> list[str]:
    tables = ("settings", "starts")
    lines = [f"{key} = {_value(value)}" for key, value in content.items() if key not in tables]
    for name, table in content["settings"].items():
        lines += ["", f"[settings.{name}]", *(f'"{key}" = {_value(value)}' for key, value in table.items())]
    for start in content["starts"]:
        lines += ["", "[[starts]]", *(f"{key} = {_value(value)}" for key, value in start.items())]
    return [*lines, ""]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f'"{key}" = {_value(one)}' for key, one in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
