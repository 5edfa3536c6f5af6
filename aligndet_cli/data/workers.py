"""Worker processes that do tasks ahead of time, hand over results in order, and whose every failure is told.

A result comes in a file that has no name, whose number goes through a socket that has no name: nothing of it lies in
/dev/shm or TMPDIR, which may be full or have a long path, and no thread between worker and socket can fail silently.
"""

import contextlib
import errno
import itertools
import mmap
import multiprocessing
import os
import pickle
import socket
import struct
import sys
import tempfile
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, BinaryIO, TypeVar, cast

import torch

from aligndet_cli.data.packing import into_pinned_memory, pack, unpack
from aligndet_cli.errors import AlignDetError, RunError
from aligndet_cli.processes.ends import describe_end, starting_processes
from aligndet_cli.processes.signals import POLL_S, leave_stopping_to_main_process, look_at_signals, no_signals

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 4  # tasks that a worker has at once
_MESSAGE = struct.Struct("<Bqq")  # a kind, and two numbers
_VALUE, _ERROR = range(2)  # with a file: bytes of its block, and of the head after it
_UNSENT = 2  # there could be no file: number of the system's error
_PATIENCE_S = 2.0  # for a worker to end when it is told to


@dataclass(frozen=True)
class _Worker:
    """A worker and the ends of its connections that are ours."""

    process: BaseProcess
    tasks: Connection
    results: socket.socket

    def take(self, *, is_pinned: bool) -> Any:
        """Return the next result, which must be there.

        Raises:
            EOFError: the worker has ended.
            Exception: that of the function, or of handing over.
        """
        message, files, _, _ = socket.recv_fds(self.results, _MESSAGE.size, 1)
        if not message:
            raise EOFError
        kind, first, second = _MESSAGE.unpack(message)
        if kind == _UNSENT:
            raise RunError(
                f"a process that reads images cannot hand over a batch ({os.strerror(first)}): free some memory (or "
                f"space in {tempfile.gettempdir()}), or use --num-workers 0; then run the same command to continue"
            )
        with os.fdopen(files[0], "rb") as file:
            content = torch.frombuffer(mmap.mmap(file.fileno(), first + second), dtype=torch.uint8)
        block, head = content[:first], content[first:]
        value = unpack(head.numpy().tobytes(), into_pinned_memory(block) if is_pinned else block)
        if kind == _ERROR:
            raise value
        return value


def results_in_order(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_workers: int,
    *,
    is_pinned: bool = False,
    patience_s: float = 0.0,
) -> Generator[Result, None, None]:
    """Yield `function(task)` of all tasks, done by processes, until it is closed.

    Args:
        function: picklable where processes are not forked, as its tasks and its results always.
        is_pinned: put the tensors of results into pinned memory.
        patience_s: see `look_at_signals`.

    Raises:
        RunError: a worker died.
        Exception: that of the function.
    """
    remaining = iter(tasks)
    workers: list[_Worker] = []
    # At the exit of this process at the latest, before Python waits for its children.
    end = Finalize(None, _end, args=[workers], exitpriority=1)
    try:
        with starting_processes("use --num-workers 0"):
            for _ in range(num_workers):
                workers.append(_start(function, workers))
        turns = itertools.cycle(workers)
        pending: deque[_Worker] = deque()
        for task in itertools.islice(remaining, _AHEAD * num_workers):
            pending.append(_give(next(turns), task))
        while pending:
            worker = pending.popleft()
            _wait_for(worker, workers, patience_s)
            try:
                result = worker.take(is_pinned=is_pinned)
            except (EOFError, ConnectionError):
                raise _lost(worker) from None
            for task in itertools.islice(remaining, 1):
                pending.append(_give(next(turns), task))
            yield result
    finally:
        end()


def _wait_for(worker: _Worker, workers: list[_Worker], patience_s: float) -> None:
    """Return once a worker has a result, or has ended."""
    while not wait([worker.results, worker.process.sentinel], POLL_S):
        look_at_signals(patience_s)
        for other in workers:
            if not other.process.is_alive():
                raise _lost(other)


def _give(worker: _Worker, task: Any) -> _Worker:
    try:
        worker.tasks.send(task)
    except ConnectionError:
        raise _lost(worker) from None
    return worker


def _lost(worker: _Worker) -> RunError:
    worker.process.join(_PATIENCE_S)
    told = describe_end(worker.process.exitcode, "lower --num-workers or --batch-size")
    return RunError(f"a process that reads images {told}; then run the same command to continue")


def _start(function: Callable[[Any], Any], others: list[_Worker]) -> _Worker:
    # A fork takes no time to start and shares the labels. (Newer versions of Python would not fork by themselves.)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    theirs, tasks = context.Pipe(duplex=False)
    results, their_results = socket.socketpair()
    # The fork has our ends of all connections, too, and must not keep them open.
    ours = [end for worker in others for end in (worker.tasks, worker.results)] + [tasks, results]
    process = context.Process(target=_work, args=(function, theirs, their_results, ours), daemon=True)
    with no_signals(), warnings.catch_warnings():
        # What the worker uses takes no lock that another thread could hold.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        process.start()
    theirs.close()
    their_results.close()
    return _Worker(process, tasks, results)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.tasks.close()
        worker.results.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_PATIENCE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(
    function: Callable[[Any], Any], tasks: Connection, results: socket.socket, ours: list[Connection | socket.socket]
) -> None:
    """Do tasks until there are no more: the body of a worker."""
    for end in ours:
        end.close()
    torch.set_num_threads(1)
    leave_stopping_to_main_process()
    with contextlib.suppress(EOFError, ConnectionError):  # nobody is there any more
        while True:
            task = tasks.recv()
            try:
                kind, value = _VALUE, function(task)
            except Exception as error:
                kind, value = _ERROR, _portable(error)
            _send(results, kind, value)


def _send(results: socket.socket, kind: int, value: Any) -> None:
    try:
        packed = pack(value)
        with _nameless_file() as file:
            packed.write(file)
            file.seek(packed.size)
            file.write(packed.head)
            socket.send_fds(results, [_MESSAGE.pack(kind, packed.size, len(packed.head))], [file.fileno()])
    except ConnectionError:
        raise
    except (OSError, MemoryError) as error:
        number = getattr(error, "errno", None) or errno.ENOMEM
        results.sendall(_MESSAGE.pack(_UNSENT, number, 0))


def _nameless_file() -> BinaryIO:
    """Return a file in memory; where the system has none, in the temporary folder."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(PermissionError):  # forbidden in some containers
            return os.fdopen(os.memfd_create("aligndet"), "w+b", buffering=0)
    return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))


def _portable(error: Exception) -> Exception:
    """Return an error that can be pickled, and that says where it was raised if that is of use."""
    if isinstance(error, AlignDetError):
        return error
    where = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a process that reads images:\n{where}")
    return error
