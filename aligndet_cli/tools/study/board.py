"""The state of a study while its runs are carried out, one after another or side by side."""

import contextlib
import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from aligndet_cli.driver import Request, execute
from aligndet_cli.errors import AlignDetError, ChangedError, Preempted, as_user_error
from aligndet_cli.logs import clock, logger
from aligndet_cli.tools.study.plan import StageRun


@dataclass(frozen=True)
class Problem:
    """The reason why a run has no result."""

    exit_code: int
    message: str
    is_of_another: bool = False  # a run that it needs has failed; this one was not begun


@dataclass(frozen=True)
class RunState:
    """The state of one run of a study.

    Attributes:
        state: `complete`, `interrupted`, `changed` (there with other settings), `missing`, `done` (just now),
            `failed`, or `not run` (what it needs has failed).
    """

    stage: str
    name: str
    state: str
    message: str = ""


@dataclass
class Board:
    """The runs of a study: done, under way and to do."""

    runs: dict[str, StageRun]
    complete: set[str]  # keys of the runs that were there already
    jobs: int  # runs at a time
    expected: Mapping[str, float] = field(default_factory=dict)  # seconds of a run by stage, until one is finished
    done: set[str] = field(default_factory=set)
    problems: dict[str, Problem] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # that finished runs took, by stage
    _started: dict[str, float] = field(default_factory=dict)

    def begin_next(self) -> StageRun | None:
        """Return the first run that has all its inputs and note that it begins; None while there is none."""
        for number, (key, run) in enumerate(self.runs.items(), start=1):
            if not self._is_over(key) and key not in self._started and self._is_there(*run.needs):
                left = self.seconds_left()
                eta = "" if left is None else f", about {clock(left)} left"
                logger.info(f"run {number} of {len(self.runs)}: {key}{eta}")
                self._started[key] = time.monotonic()
                return run
        return None

    def finish(self, run: StageRun, problem: Problem | None) -> None:
        """Note how a run ended; if it failed, the runs that need it cannot run."""
        took = time.monotonic() - self._started.pop(run.key)
        if problem is None:
            self.done.add(run.key)
            self.seconds.setdefault(run.stage, []).append(took)
            return
        logger.error(f"{run.key}: {problem.message}")
        self.problems[run.key] = problem
        for other in self.runs.values():  # in the order of need
            failed = [key for key in other.needs if key in self.problems]
            if failed and other.key not in self.problems:
                self.problems[other.key] = Problem(problem.exit_code, f"not run: {failed[0]} failed", True)

    def seconds_left(self) -> float | None:
        """Estimate the seconds left from the finished runs; None before one of each stage that is left has finished."""
        means = {**self.expected, **{stage: sum(times) / len(times) for stage, times in self.seconds.items()}}
        left = [run.stage for key, run in self.runs.items() if not self._is_over(key)]
        if not means.keys() >= set(left):
            return None
        now = time.monotonic()
        spent = sum(now - began for began in self._started.values())
        return max(sum(means[stage] for stage in left) - spent, 0) / self.jobs

    def states(self) -> list[RunState]:
        """Return the state of every run, in order."""
        return [self._state(run) for run in self.runs.values()]

    def _state(self, run: StageRun) -> RunState:
        problem = self.problems.get(run.key)
        if problem is None:
            return RunState(run.stage, run.name, "complete" if run.key in self.complete else "done")
        return RunState(run.stage, run.name, "not run" if problem.is_of_another else "failed", problem.message)

    def _is_there(self, *keys: str) -> bool:
        return all(key in self.complete or key in self.done for key in keys)

    def _is_over(self, key: str) -> bool:
        return self._is_there(key) or key in self.problems


def perform(request: Request) -> Problem | None:
    """Execute one run and return its problem, if any, even if that is a bug of ours: the other runs go on.

    Raises:
        Preempted, KeyboardInterrupt, Stopped: asked to stop.
    """
    try:
        gate = execute(request).conclusion.error
        return None if gate is None else Problem(gate.exit_code, str(gate))
    except Preempted:
        raise
    except ChangedError as error:  # the flags that the stage names are not the study's
        told = f"{error.told}. Change the label, use another --workspace, or delete its folder"
        return Problem(error.exit_code, told)
    except AlignDetError as error:
        return Problem(error.exit_code, str(error))
    except Exception as error:
        known = as_user_error(error)
        if known is not None:
            return Problem(known.exit_code, str(known))
        logger.error(traceback.format_exc())
        return Problem(1, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def warnings_once() -> Iterator[None]:
    """Log each warning once: runs on the same images say the same."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno != logging.WARNING or message not in said:
            said.add(message)
            return True
        return False

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
