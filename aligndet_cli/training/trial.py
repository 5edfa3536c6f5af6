"""A step taken before the run, in a process of its own, to see how much memory steps need on a CPU."""

import contextlib
import gc
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from aligndet_cli.data.sample import Sample
from aligndet_cli.errors import RunError
from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.launch import run_here
from aligndet_cli.processes.memory import Usage, give_back_freed_memory, limit_growth, process_usage
from aligndet_cli.training.batch_size import Trial
from aligndet_cli.training.loop import build_scaler, memory_that_ran_out, train_step, watch_divergence

_PATIENCE_S = 300.0
_POLL_S = 0.2
GAPS_SPARED = 1.1  # as `Trial.gaps`, where freed memory is given back at once
# Of decoded images: those of the step, and the next ones while they are read and packed.
_BATCHES_HELD = 2
_NO_ROOM: Literal["out of memory"] = "out of memory"


@dataclass(frozen=True)
class Footprint:
    """Bytes that steps take, beside what a process has before the model is built.

    Attributes:
        started: what it has then.
        unused: of the address space that is taken, but not the memory.
        fixed: model, gradients, optimizer, libraries.
        per_image: of a micro-batch, for the largest images, without gaps between blocks.
        per_sample: of the batch of a process, for decoded images with their boxes and masks.
        gaps: see `Trial`.
    """

    started: int
    unused: int
    fixed: int
    per_image: int
    per_sample: int
    gaps: float

    def of(self, batch: int, accumulate: int = 1, *, is_sparing: bool = False) -> int:
        """Taken by steps with so many images in a process, in so many micro-batches.

        Args:
            is_sparing: freed memory is given back at once.
        """
        images = round(-(-batch // accumulate) * self.per_image * (GAPS_SPARED if is_sparing else self.gaps))
        return self.fixed + images + _BATCHES_HELD * batch * self.per_sample


def try_step(trial: Trial, room: int | None) -> Footprint | None:
    """What steps take on a CPU, by taking one with a single image; None where that cannot be told.

    Args:
        room: bytes that the process may take; it is ended where it would take more.

    Raises:
        RunError: a single image takes more.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(trial, room, theirs), name="trial")
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        outcome = _outcome(process.pid, ours, room)
    finally:
        process.kill()
        process.join()
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
    """Bytes for people."""
    return f"{max(count, 0) / 1e9:.2g} GB"


def _outcome(pid: int, connection: Connection, room: int | None) -> Footprint | str:
    """What the process measured, or why it could not."""
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        try:
            if connection.poll(_POLL_S):
                found: Footprint | str = connection.recv()
                return found
        except (EOFError, ConnectionError):  # it died without a word: killed by the system, or by a library
            return _NO_ROOM
        usage = process_usage(pid)
        if room is not None and usage is not None and usage.resident > room:
            return _NO_ROOM
    return f"the step took longer than {_PATIENCE_S:g} s"


def _work(trial: Trial, room: int | None, connection: Connection) -> None:
    """Body of the process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Path(os.devnull).open("w") as nowhere:  # libraries that run out of memory say so at length
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    with contextlib.suppress(OSError):  # should the system need memory all the same, it begins with this process
        Path("/proc/self/oom_score_adj").write_text("1000")
    limit_growth(room)
    try:
        run_here(lambda trial, process: connection.send(_measure(trial, process)), trial, Process())
    except Exception as error:
        connection.send(_NO_ROOM if memory_that_ran_out(error) else f"{type(error).__name__}: {error}")


def _measure(trial: Trial, process: Process) -> Footprint | str:
    """A small step brings libraries, gradients and the optimizer's state; then one of the real size."""
    give_back_freed_memory()
    before = process_usage()
    if before is None:
        return "this system does not tell what a process uses"
    learner = trial.build(process)
    scaler, divergence = build_scaler(trial.settings, process), watch_divergence(learner, process)

    def take(step: int, samples: list[Sample]) -> None:
        train_step(learner, scaler, samples, step, trial.settings, divergence)
        learner.after_step(step)

    take(0, trial.draw_small())
    gc.collect()
    fixed = _usage().resident - before.resident  # with gradients, although few are there when the images need most
    learner.optimizer.zero_grad(set_to_none=True)
    idle, samples = _usage(), trial.draw(1)
    take(1, samples)
    peak = _usage().mapped_peak
    tensors = [tensor for sample in samples for tensor in (sample.image, sample.masks) if tensor is not None]
    return Footprint(
        started=before.resident,
        unused=max(idle.mapped - before.mapped - (idle.resident - before.resident), 0),
        fixed=fixed,
        per_image=max(peak - idle.mapped, 0),
        per_sample=sum(tensor.nbytes for tensor in tensors),
        gaps=trial.gaps,
    )


def _usage() -> Usage:
    usage = process_usage()
    assert usage is not None
    return usage


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
