"""Checks of all runs of a study before the first one begins."""

import logging
from collections.abc import Collection, Mapping, Sequence

from aligndet_cli.config import hash_json
from aligndet_cli.errors import AlignDetError
from aligndet_cli.stage import find_stage
from aligndet_cli.tools.study.plan import StageRun
from aligndet_cli.tools.study.run import quiet_stages
from aligndet_cli.workspace import Workspace

# Settings that no check depends on.
_IDLE = ("name", "label", "seed", "fold", "run")


def look_ahead(runs: Sequence[StageRun], states: Mapping[str, str], workspace: Workspace) -> None:
    """Check the runs that are not complete, as far as that goes without what earlier runs will have made.

    Args:
        states: by key, see `look_up`.

    Raises:
        AlignDetError: the first problem, with its start and its stage, and the number of others.
    """
    complete = {key for key, state in states.items() if state == "complete"}
    seen: set[str] = set()
    problems: list[AlignDetError] = []
    with quiet_stages(logging.ERROR):
        for run in runs:
            if run.key in complete or (identity := _identity(run, complete)) in seen:
                continue
            seen.add(identity)
            try:
                find_stage(run.stage).steps().look_ahead(run.config(), workspace, pending_of(run, complete))
            except AlignDetError as error:
                problems.append(type(error)(f"start '{run.start}', {run.stage}: {error}"))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise type(problems[0])(f"{problems[0]}{more}")


def pending_of(run: StageRun, complete: Collection[str]) -> frozenset[str]:
    """Return the settings of a run that name artifacts of runs that are not complete."""
    made = {key.partition("/")[0] for key in run.needs if key not in complete}
    return frozenset(read.setting for read in find_stage(run.stage).reads if read.stage in made)


def _identity(run: StageRun, complete: Collection[str]) -> str:
    pending = pending_of(run, complete)
    settings = {path: value for path, (_, value) in run.settings.items() if path not in (*_IDLE, *pending)}
    return hash_json([run.stage, settings, sorted(pending)])
