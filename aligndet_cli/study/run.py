"""Carrying out a study: one run after the other, or several at a time on devices of their own."""

import contextlib
import logging
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from aligndet_cli.driver import Request, execute
from aligndet_cli.errors import AlignDetError, Preempted, as_user_error
from aligndet_cli.study.plan import StageRun, finished
from aligndet_cli.training.launch import Shown
from aligndet_cli.training.logs import clock, logger
from aligndet_cli.workspace import Workspace

_REFUSED = " with other settings: "  # see `Workspace.plan_output`


@dataclass(frozen=True)
class Problem:
    """Why a run has no result."""

    exit_code: int
    message: str


@dataclass(frozen=True)
class RunState:
    """What is known about a run of a study.

    Attributes:
        state: `complete`, `interrupted`, `changed` (there with other settings), `missing`, `done` (just now),
            `failed`, or `not run` (what it needs has failed).
    """

    stage: str
    name: str
    state: str
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass
class Board:
    """Which runs are done, under way and to do."""

    runs: dict[str, StageRun]
    complete: set[str]
    done: set[str] = field(default_factory=set)
    problems: dict[str, Problem] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # that finished runs took, by stage
    _started: dict[str, float] = field(default_factory=dict)

    def next_ready(self) -> StageRun | None:
        """The first run that has not begun and has all it needs; None while there is none."""
        for key, run in self.runs.items():
            if not self._is_over(key) and key not in self._started and self._has_inputs(run):
                self._started[key] = time.monotonic()
                return run
        return None

    def finish(self, run: StageRun, problem: Problem | None) -> None:
        """Note how a run ended, and that those which need it cannot run."""
        took = time.monotonic() - self._started.pop(run.key)
        if problem is None:
            self.done.add(run.key)
            self.seconds.setdefault(run.stage, []).append(took)
            return
        self.problems[run.key] = problem
        for other in self.runs.values():  # in the order of need
            failed = [key for key in other.needs if key in self.problems]
            if failed and other.key not in self.problems:
                self.problems[other.key] = Problem(problem.exit_code, f"not run: {failed[0]} failed")

    def seconds_left(self, jobs: int) -> float | None:
        """Estimated from the runs that are finished; None before the first one is."""
        means = {stage: sum(times) / len(times) for stage, times in self.seconds.items()}
        if not means:
            return None
        guess = sum(means.values()) / len(means)
        left = [run.stage for key, run in self.runs.items() if not self._is_over(key)]
        now = time.monotonic()
        spent = sum(now - began for began in self._started.values())
        return max(sum(means.get(stage, guess) for stage in left) - spent, 0) / jobs

    def states(self) -> list[RunState]:
        """One line per run, in order."""
        return [self._state(run) for run in self.runs.values()]

    def _state(self, run: StageRun) -> RunState:
        problem = self.problems.get(run.key)
        if problem is not None:
            state = "not run" if problem.message.startswith("not run: ") else "failed"
            return RunState(run.stage, run.name, state, problem.message)
        return RunState(run.stage, run.name, "complete" if run.key in self.complete else "done")

    def _is_over(self, key: str) -> bool:
        return key in self.complete or key in self.done or key in self.problems

    def _has_inputs(self, run: StageRun) -> bool:
        return all(key in self.complete or key in self.done for key in run.needs)


def look_up(runs: list[StageRun], workspace: Workspace) -> dict[str, str]:
    """State of each run by key, before anything runs; see `RunState`.

    A run is complete when its artifact has the settings of the study and was made from the artifacts that are there;
    no data is opened to find out.
    """
    states: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for run in runs:
        folder = workspace.root / run.stage / run.name
        artifact = finished(run, workspace)
        if artifact is None:
            is_begun = (folder.with_name(f".{run.name}.partial") / "manifest.json").exists()
            is_there = (folder / "manifest.json").exists()
            states[run.key] = "changed" if is_there else "interrupted" if is_begun else "missing"
            continue
        made_from = set(artifact.manifest["inputs"].values())
        is_current = all(hashes.get(key) in made_from for key in run.needs)
        states[run.key] = "complete" if is_current else "changed"
        hashes[run.key] = artifact.content_hash
    return states


def carry_out(runs: list[StageRun], workspace: Workspace, *, jobs: int, gpus: tuple[str, ...], shown: Shown) -> Board:
    """Do every run that is not complete; one that fails stops only those that need it.

    Args:
        jobs: runs at a time.
        gpus: names for CUDA_VISIBLE_DEVICES; several jobs take turns. Empty: the CPU.

    Raises:
        Preempted, KeyboardInterrupt: asked to stop; what was under way is saved.
    """
    states = look_up(runs, workspace)
    board = Board({run.key: run for run in runs}, {key for key, state in states.items() if state == "complete"})
    if len(board.complete) == len(runs):
        return board
    _remember_data(runs, workspace)
    if jobs == 1:
        while (run := board.next_ready()) is not None:
            announce(board, run, jobs)
            with _quiet_stages(shown):
                problem = perform(request_of(run, workspace, shown))
            conclude(board, run, problem)
    else:
        from aligndet_cli.study.workers import carry_out_in_parallel

        carry_out_in_parallel(board, workspace, jobs=jobs, gpus=gpus, verbosity=shown.verbosity)
    return board


def request_of(run: StageRun, workspace: Workspace, shown: Shown) -> Request:
    """The command that makes a run."""
    return Request(run.stage, workspace, run.sources, shown=shown)


def perform(request: Request) -> Problem | None:
    """Execute one run; what goes wrong is returned, also where it is a bug of ours: the others go on.

    Raises:
        Preempted, KeyboardInterrupt, Stopped: asked to stop.
    """
    try:
        gate = execute(request).failed_gate
        return None if gate is None else Problem(gate.exit_code, str(gate))
    except Preempted:
        raise
    except AlignDetError as error:
        return Problem(error.exit_code, str(error))
    except Exception as error:
        known = as_user_error(error) if isinstance(error, OSError) else None
        if known is not None:
            return Problem(known.exit_code, str(known))
        logger.error(traceback.format_exc())
        return Problem(1, f"{type(error).__name__}: {error}")


def announce(board: Board, run: StageRun, jobs: int) -> None:
    """Say which run begins, and how long all of it may take."""
    left = board.seconds_left(jobs)
    eta = "" if left is None else f", about {clock(left)} left"
    number = list(board.runs).index(run.key) + 1
    logger.info(f"run {number} of {len(board.runs)}: {run.key}{eta}")


def conclude(board: Board, run: StageRun, problem: Problem | None) -> None:
    """Note and say how a run ended."""
    if problem is not None and _REFUSED in problem.message:
        # The flags that the stage names are not the study's.
        told = problem.message.split(". Use ")[0]
        problem = Problem(problem.exit_code, f"{told}. Change the label, use another --workspace, or delete its folder")
    board.finish(run, problem)
    if problem is not None:
        logger.error(f"{run.key}: {problem.message}")


def _remember_data(runs: list[StageRun], workspace: Workspace) -> None:
    """What the first of the stages would do, done once, before several of them run at a time."""
    if workspace.recall("data") is None:
        run = next((run for run in runs if run.stage not in ("pretrain-image", "evaluate")), None)
        if run is not None:
            data = run.config().data.model_dump(mode="json")
            workspace.remember("data", {key: data[key] for key in ("root", "format", "annotations", "images")})


@contextlib.contextmanager
def _quiet_stages(shown: Shown) -> Iterator[None]:
    """Warnings only, unless more was asked for: the stages tell much more than one wants to read many times."""
    level = logger.level
    if shown.verbosity <= 0:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
