"""Metrics that an evaluation has: one of boxes has none of masks."""

from collections.abc import Mapping, Sequence
from typing import Any

from aligndet_cli.errors import ConfigError
from aligndet_cli.files import read_json
from aligndet_cli.workspace import Artifact, Workspace

Numbers = dict[str, float | None]


def numbers_of(evaluation: Artifact, metrics: Sequence[str]) -> Numbers:
    """Return those of the metrics that an evaluation has; None where one could not be measured."""
    result = _numbers_in(evaluation.result)
    if not set(metrics) <= result.keys():
        result = _all_of(evaluation)
    return {name: result[name] for name in metrics if name in result}


def check_measured(measured: Mapping[str, Numbers], metrics: Sequence[str], workspace: Workspace) -> list[str]:
    """Return remarks on evaluations without one of the metrics.

    Args:
        measured: numbers by the name of the evaluation.

    Raises:
        ConfigError: none of them has it.
    """
    remarks = []
    for metric in metrics:
        without = [name for name, numbers in measured.items() if metric not in numbers]
        if without and len(without) == len(measured):
            numbers = _all_of(workspace.require("evaluate", without[0]))
            known = [name for name, value in numbers.items() if isinstance(value, float)]
            raise ConfigError(f"--metric {metric}: not measured by {without[0]}; there are: {', '.join(known)}")
        if without:
            remarks.append(
                f"{metric}: not measured by {len(without)} of {len(measured)} evaluations, first {without[0]}"
            )
    return remarks


def _all_of(evaluation: Artifact) -> Numbers:
    """Return the numbers of an evaluation, with those that its summary leaves out."""
    return _numbers_in({**read_json(evaluation.folder / "metrics.json"), **evaluation.result})


def _numbers_in(found: Mapping[str, Any]) -> Numbers:
    return {name: value for name, value in found.items() if isinstance(value, float | int | None)}
