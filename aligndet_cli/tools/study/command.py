"""`aligndet study`: from the file to the report."""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligndet_cli.errors import ERROR_BY_EXIT_CODE, AlignDetError, ConfigError
from aligndet_cli.logs import logger, resolve_progress_mode
from aligndet_cli.processes.devices import joined_world_size
from aligndet_cli.processes.launch import Shown
from aligndet_cli.tools.report.collect import Report, collect_report
from aligndet_cli.tools.study.ahead import look_ahead
from aligndet_cli.tools.study.board import Problem, RunState
from aligndet_cli.tools.study.plan import StageRun, plan_runs
from aligndet_cli.tools.study.run import carry_out, look_up
from aligndet_cli.tools.study.spec import StudyConfig, load_study
from aligndet_cli.workspace import Workspace


@dataclass(frozen=True)
class StudyOutcome:
    """The outcome of a study.

    Attributes:
        report: None after a dry run.
        failure: to be raised once everything is printed; has the exit code of the first run that failed, or would.
    """

    states: list[RunState]
    report: Report | None
    failure: AlignDetError | None

    @property
    def failed(self) -> list[RunState]:
        """Runs that failed, without those that only needed them."""
        return [state for state in self.states if state.state == "failed"]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        status = "dry run" if self.report is None else "failed" if self.failure else "done"
        runs = list(map(vars, self.states))
        return {"status": status, "runs": runs, "report": self.report and self.report.to_json()}

    def listing(self) -> str:
        """Return one line per run, for a dry run."""
        return "\n".join(f"{state.state:<12} {state.stage}/{state.name}" for state in self.states)


def run_study(
    file: Path,
    workspace: Workspace,
    *,
    jobs: int | None = None,
    dry_run: bool = False,
    shown: Shown | None = None,
    expected: Mapping[str, float] | None = None,
) -> StudyOutcome:
    """Plan, run what is missing, and report.

    Args:
        jobs: runs at a time; None: one per GPU, else one.
        shown: output of single runs; progress "auto" shows it on a terminal only, and only if one runs at a time.
        expected: seconds of a run by stage, where they are known.

    Raises:
        AlignDetError: the study cannot be read, contradicts itself, or has a run that will fail (a dry run returns it).
        Preempted, KeyboardInterrupt: asked to stop; the same command goes on.
    """
    refuse_joining()
    study = load_study(file)
    runs = plan_runs(study, workspace)
    states = look_up(runs, workspace)
    counts = [f"{sum(run.stage == stage for run in runs)} {stage}" for stage in dict.fromkeys(r.stage for r in runs)]
    num_complete = sum(state == "complete" for state in states.values())
    logger.info(f"{file}: {len(runs)} runs ({', '.join(counts)}), {num_complete} complete")
    try:
        look_ahead(runs, states, workspace)
    except AlignDetError as error:
        if not dry_run:
            raise
        return _listed(runs, states, failure=error)
    if dry_run:
        return _listed(runs, states)
    gpus = _gpus() if num_complete < len(runs) else ()
    jobs = len(gpus) or 1 if jobs is None else jobs
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: one at least")
    shown = shown or Shown("none")
    if shown.progress == "auto" and resolve_progress_mode("auto", sys.stderr) == "plain":
        shown = replace(shown, progress="none")
    board = carry_out(runs, workspace, jobs=jobs, gpus=gpus, shown=shown, expected=expected or {})
    names = {run.name for run in runs if run.stage == "evaluate"}
    report = collect_report(workspace, baseline=study.starts[0].label, names=names)
    return StudyOutcome(board.states(), report, _failure(board.states(), board.problems))


def refuse_joining() -> None:
    """Raise a ConfigError under torchrun or Slurm, where each process would start a study of its own."""
    if joined_world_size() is not None:
        raise ConfigError("study: starts processes of its own; start it once, without torchrun or srun")


def list_runs(study: StudyConfig, workspace: Workspace) -> StudyOutcome:
    """Return the runs of a study and their states; nothing runs."""
    runs = plan_runs(study, workspace)
    return _listed(runs, look_up(runs, workspace))


def _listed(runs: Iterable[StageRun], states: Mapping[str, str], failure: AlignDetError | None = None) -> StudyOutcome:
    return StudyOutcome([RunState(run.stage, run.name, states[run.key]) for run in runs], None, failure)


def evaluations_of(files: Iterable[Path], workspace: Workspace) -> set[str]:
    """Return the names of the evaluations that studies ask for.

    Raises:
        ConfigError: a study cannot be read, or contradicts itself.
    """
    runs = [run for file in files for run in plan_runs(load_study(file), workspace)]
    return {run.name for run in runs if run.stage == "evaluate"}


def _failure(states: list[RunState], problems: dict[str, Problem]) -> AlignDetError | None:
    failed = [state for state in states if state.state == "failed"]
    if not failed:
        return None
    num_blocked = sum(state.state == "not run" for state in states)
    blocked = f", and {num_blocked} that need them did not run" if num_blocked else ""
    kind = ERROR_BY_EXIT_CODE.get(problems[f"{failed[0].stage}/{failed[0].name}"].exit_code, AlignDetError)
    return kind(f"{len(failed)} of {len(states)} runs failed{blocked}; run the same command to try them again")


def _gpus() -> tuple[str, ...]:
    """Return the visible GPUs, by their names for CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return tuple(visible[:count]) or tuple(str(number) for number in range(count))
