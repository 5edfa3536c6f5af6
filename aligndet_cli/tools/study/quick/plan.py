"""The plan of a quick study: an ordinary study file in the workspace, and how it came about."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligndet_cli.errors import ConfigError
from aligndet_cli.files import read_json, write_bytes, write_json
from aligndet_cli.tools.study.quick.budget import FOLD, Size
from aligndet_cli.tools.study.quick.fit import Tables, rates_of
from aligndet_cli.workspace import Workspace

NAME = "quick"  # of the files, and first part of the names of runs
OURS = "AlignDet"
_FORMAT = 1


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
class QuickPlan:
    """A plan.

    Attributes:
        lines: what will run and how long it takes, by title, for people.
        seconds: estimate of the whole.
        expected: estimate of a run by stage.
        content: of the study file in which several rates of the baseline are compared.
    """

    asked: Asked
    lines: Mapping[str, str]
    seconds: float
    expected: Mapping[str, float]
    content: Mapping[str, Any]

    @property
    def baselines(self) -> list[str]:
        """Labels of the baseline at its rates."""
        return [start["label"] for start in self.content["starts"] if start["label"] != OURS]

    def with_baseline(self, label: str) -> dict[str, Any]:
        """Return the content in which the baseline of that label is compared over all seeds and fractions."""
        starts = {start["label"]: start for start in self.content["starts"]}
        best = {key: value for key, value in starts.pop(label).items() if key not in ("seeds", "fractions")}
        ours = starts.pop(OURS)
        return {**self.content, "starts": [best, ours, *starts.values()]}

    def text(self, content: Mapping[str, Any]) -> str:
        """Return the study file."""
        told = [f"# {title}: {line}" for title, line in self.lines.items()]
        head = f"# Does box-domain pre-training pay on this data? Planned by\n#   {self.asked.command()}"
        return "\n".join([head, *told, "", *_toml(content)])


def study_of(data: Path, detector: str, size: Size, tables: Tables) -> dict[str, Any]:
    """Return the content of a study in which several rates of the baseline are compared with some of the seeds."""
    rates = rates_of(detector)
    settings = {name: dict(table) for name, table in tables.items()}
    settings["pretrain-box"]["training.steps"] = size.pretrain_steps
    settings["finetune"]["training.steps"] = size.finetune_steps
    part = {"seeds": list(range(size.rate_seeds)), "fractions": [size.fractions[-1]]}
    plain = [
        {"label": f"backbone only, lr {lr:g}", "init": "backbone", **part, "finetune": {"training.lr": lr}}
        for lr in rates.plain
    ]
    ours = {"label": OURS, "init": "pretrain", "finetune": {"training.lr": rates.finetune}}
    return {
        "name": NAME,
        "data": str(data.absolute()),
        "detectors": [detector],
        "fractions": list(size.fractions),
        "folds": [FOLD],
        "seeds": list(range(size.seeds)),
        "settings": settings,
        "starts": [*plain, ours],
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

    def read(self, asked: Asked) -> tuple[QuickPlan, str | None] | None:
        """Return the plan that was made before and the label of the chosen baseline, if it is; None without a plan.

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
        plan = QuickPlan(Asked(**known["asked"]), known["lines"], known["seconds"], known["expected"], known["content"])
        if plan.asked != asked:
            raise ConfigError(
                f"{self.study}: is the plan of `{plan.asked.command()}`; delete it for another one, or use another "
                "--workspace"
            )
        text = self.study.read_text(encoding="utf-8")
        chosen = {plan.text(plan.with_baseline(label)): label for label in plan.baselines}
        if text != plan.text(plan.content) and text not in chosen:
            raise ConfigError(f"{self.study}: was changed since it was planned; {again}")
        return plan, chosen.get(text)

    def write(self, plan: QuickPlan, baseline: str | None = None) -> None:
        """Write the plan; with the label of a chosen baseline if there is one."""
        self.workspace.root.mkdir(parents=True, exist_ok=True)
        known = {"format": _FORMAT, **vars(plan), "asked": vars(plan.asked)}
        write_json(self.study.with_suffix(".json"), known)
        content = plan.content if baseline is None else plan.with_baseline(baseline)
        write_bytes(self.study, plan.text(content).encode())


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
