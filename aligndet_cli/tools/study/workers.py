"""Processes that carry out runs of a study side by side, each on a GPU of its own."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from aligndet_cli.driver import Request
from aligndet_cli.errors import Preempted
from aligndet_cli.logs import setup_logging
from aligndet_cli.processes.launch import Shown
from aligndet_cli.processes.signals import Stopped, end_with_parent, ignore_stopping, stop_at_once, stop_on_signal
from aligndet_cli.tools.study.board import Board, Problem, perform, warnings_once
from aligndet_cli.tools.study.plan import StageRun
from aligndet_cli.workspace import Workspace

_POLL_S = 0.5  # until a signal is noticed


@dataclass
class _Worker:
    """A process, and the run it carries out."""

    process: SpawnProcess
    connection: Connection
    run: StageRun | None = None


def carry_out_in_parallel(board: Board, workspace: Workspace, *, gpus: tuple[str, ...], verbosity: int) -> None:
    """Keep as many processes at work as the board has jobs, until nothing is left that can run.

    Raises:
        Preempted, KeyboardInterrupt: asked to stop; the processes have saved their runs.
    """
    workers: dict[int, _Worker] = {}  # by slot
    with stop_on_signal() as stop, contextlib.ExitStack() as ending, _killed_if_interrupted(workers):
        while stop.received is None:
            for slot in range(board.jobs):
                worker = workers.get(slot)
                if (worker is None or worker.run is None) and (run := board.begin_next()) is not None:
                    worker = workers[slot] = worker or _start(slot, board.jobs, gpus, verbosity, ending)
                    worker.run = run
                    with contextlib.suppress(ConnectionError):  # it died: noticed when its result is read
                        worker.connection.send(
                            Request(run.stage, workspace, run.sources, shown=Shown("none", verbosity))
                        )
            if not any(worker.run for worker in workers.values()):
                return
            _take_in(board, workers)
        for worker in workers.values():  # they save and end, however long that takes
            worker.process.terminate()
        for worker in workers.values():
            worker.process.join()
        stop.raise_if_requested()


@contextlib.contextmanager
def _killed_if_interrupted(workers: dict[int, _Worker]) -> Iterator[None]:
    """Kill the processes if a second signal ends the block: nobody waits until they have saved."""
    try:
        yield
    except (KeyboardInterrupt, Stopped):
        for worker in workers.values():
            worker.process.kill()
        raise


def _start(slot: int, jobs: int, gpus: tuple[str, ...], verbosity: int, ending: contextlib.ExitStack) -> _Worker:
    """Start a process that ends with the block of `ending`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    gpu = ",".join(gpus[slot::jobs]) or gpus[slot % len(gpus)] if gpus else None
    threads = max(len(os.sched_getaffinity(0)) // jobs, 1)
    process = context.Process(target=_work, args=(theirs, gpu, threads, verbosity), name=f"study-{slot}")
    process.start()
    theirs.close()
    ending.callback(process.join)
    ending.callback(ours.close)  # first: idle ones end, and busy ones once a result cannot be sent
    return _Worker(process, ours)


def _take_in(board: Board, workers: dict[int, _Worker]) -> None:
    """Wait a moment for results; a process that died takes only its own run with it."""
    busy = {worker.connection: slot for slot, worker in workers.items() if worker.run}
    for connection in wait(list(busy), timeout=_POLL_S):
        slot = busy[connection]  # type: ignore[index]  # only connections went in
        worker = workers[slot]
        assert worker.run is not None
        try:
            problem = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            code = worker.process.exitcode
            problem = Problem(1, f"its process died (exit code {code}; -9 usually means out of memory)")
            del workers[slot]
        run, worker.run = worker.run, None
        board.finish(run, problem)


def _work(connection: Connection, gpu: str | None, threads: int, verbosity: int) -> None:
    """Carry out the requests that come through the connection until it is closed: the body of a process."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    stop_at_once()
    end_with_parent()  # a study that was killed leaves nobody behind who holds the locks of its runs
    setup_logging(verbosity if verbosity > 0 else -1)
    try:
        import torch

        if gpu is None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        with warnings_once():
            while True:
                connection.send(perform(connection.recv()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt, Stopped, Preempted):
        return
    finally:
        ignore_stopping()
