"""Measure the memory of steps on a CPU, by taking one before the run in a process of its own."""

import contextlib
import gc
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Literal

from aligndet_cli.data.sample import Sample
from aligndet_cli.errors import RunError, memory_that_ran_out
from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.launch import run_here
from aligndet_cli.processes.memory import Usage, give_back_freed_memory, limit_growth, process_usage
from aligndet_cli.processes.signals import end_with_parent
from aligndet_cli.training.loop import train_step, watch_divergence
from aligndet_cli.training.trial import Trial

_PATIENCE_S = 300.0
_POLL_S = 0.2
GAPS_SPARED = 1.1  # replaces `Trial.gaps` if freed memory is given back at once
_BATCHES_HELD = 2  # decoded: the step's, and the next one while it is read
_NO_ROOM: Literal["out of memory"] = "out of memory"
_STARTED: Literal["started"] = "started"
# Not a process of multiprocessing: that would import the script that called us, and so run it a second time.
_PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
trial, room = pickle.load(sys.stdin.buffer)
from aligndet_cli.training.footprint import work
work(trial, room, int(sys.argv[1]))
"""


@dataclass(frozen=True)
class Footprint:
    """Bytes that steps of a process take.

    Attributes:
        started: in memory before the model is built; not part of `of`.
        unused: in the address space, but not in memory.
        fixed: for model, gradients, optimizer and libraries.
        per_image: for each of the largest images in a micro-batch, without gaps between blocks.
        per_sample: for each decoded image in the batch, with its masks and classes of pixels.
        gaps: see `Trial`.
    """

    started: int
    unused: int
    fixed: int
    per_image: int
    per_sample: int
    gaps: float

    def of(self, batch: int, accumulate: int = 1, *, is_sparing: bool = False) -> int:
        """Return the bytes of steps with a batch in `accumulate` micro-batches; sparing: freed memory is given back."""
        images = round(-(-batch // accumulate) * self.per_image * (GAPS_SPARED if is_sparing else self.gaps))
        return self.fixed + images + _BATCHES_HELD * batch * self.per_sample


def try_step(trial: Trial, room: int | None) -> Footprint | None:
    """Take a step with a single image and measure it; None if that fails for another reason than memory.

    Args:
        trial: model and samples.
        room: bytes that the process may take before it is ended.

    Raises:
        RunError: a single image takes more than `room`.
    """
    ours, theirs = Pipe(duplex=False)
    words = [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())]
    nowhere = subprocess.DEVNULL  # libraries that run out of memory print a lot
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, pass_fds=(theirs.fileno(),)
    )
    theirs.close()
    try:
        _hand_over(process, trial, room)
        outcome = _outcome(process, ours, room)
    finally:
        process.kill()
        process.wait()
        ours.close()
    if isinstance(outcome, Footprint):
        return outcome
    if outcome != _NO_ROOM:
        logger.info(f"  that is not known: {outcome}")
        return None
    raise RunError(
        f"a step with a single image of {trial.largest} needs more than the {gigabytes(room or 0)} of memory that "
        "are free: lower --short-side and --long-side"
    )


def gigabytes(count: int) -> str:
    """Format a number of bytes."""
    amount = max(count, 0) / 1e9
    return f"{amount:.2g} GB" if amount < 100 else f"{amount:.0f} GB"


def _hand_over(process: "subprocess.Popen[bytes]", trial: Trial, room: int | None) -> None:
    """Send what the process needs, first the places where it finds modules."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # if it is dead, the other pipe tells
        stdin.write(pickle.dumps(sys.path) + pickle.dumps((trial, room)))


def _outcome(process: "subprocess.Popen[bytes]", connection: Connection, room: int | None) -> Footprint | str:
    """Wait for what the process measured, or for the reason why it could not."""
    until, has_started = time.monotonic() + _PATIENCE_S, False
    while time.monotonic() < until:
        try:
            if connection.poll(_POLL_S):
                found: Footprint | str = connection.recv()
                if found != _STARTED:
                    return found
                has_started = True
        except (EOFError, ConnectionError):  # it died silently: killed by the system, or by a library
            code = process.wait()
            return _NO_ROOM if has_started or code < 0 else f"its process ended at once, with exit code {code}"
        usage = process_usage(process.pid)
        if room is not None and usage is not None and usage.resident > room:
            return _NO_ROOM
    return f"the step took longer than {_PATIENCE_S:g} s"


def work(trial: Trial, room: int | None, descriptor: int) -> None:
    """Measure in a process of its own, and send the result.

    Args:
        trial, room: see `try_step`.
        descriptor: number of the open end of the pipe.
    """
    end_with_parent()
    connection = Connection(descriptor, readable=False)
    connection.send(_STARTED)
    with contextlib.suppress(OSError):  # if the system runs out of memory all the same, it kills this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    limit_growth(room)
    try:
        run_here(lambda trial, process: connection.send(_measure(trial, process)), trial, Process())
    except Exception as error:
        connection.send(_NO_ROOM if memory_that_ran_out(error) else f"{type(error).__name__}: {error}")


def _measure(trial: Trial, process: Process) -> Footprint | str:
    """Take a small step, which loads libraries and makes gradients and the optimizer's state, then one of real size."""
    give_back_freed_memory()
    before = process_usage()
    if before is None:
        return "this system does not tell what a process uses"
    learner = trial.build(process)
    divergence = watch_divergence(learner, process)

    def take(step: int, samples: list[Sample]) -> None:
        train_step(learner, samples, step, trial.settings, divergence)
        learner.after_step(step)

    take(0, trial.draw_small())
    gc.collect()
    fixed = _usage().resident - before.resident  # with all gradients, although few exist when images need the most
    learner.optimizer.zero_grad(set_to_none=True)
    idle, samples = _usage(), trial.draw(1)
    take(1, samples)
    peak = _usage().mapped_peak
    kept = [part for sample in samples for part in (sample.image, sample.masks, sample.pixel_classes)]
    return Footprint(
        started=before.resident,
        unused=max(idle.mapped - before.mapped - (idle.resident - before.resident), 0),
        fixed=fixed,
        per_image=max(peak - idle.mapped, 0),
        per_sample=sum(part.nbytes for part in kept if part is not None),
        gaps=trial.gaps,
    )


def _usage() -> Usage:
    usage = process_usage()
    assert usage is not None
    return usage
