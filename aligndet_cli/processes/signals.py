"""Stop on SIGTERM, SIGUSR1 and Ctrl-C, and end worker processes with their parent.

Loops collect the signal and check it once their work is saved (`stop_on_signal`). Elsewhere, where there is nothing to
save, it ends the command at once (`stop_at_once`).
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from aligndet_cli.errors import Preempted

_PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)
_SIGNALS = (*_PREEMPTION, signal.SIGINT)


class Stopped(BaseException):
    """A signal asked to stop while there was nothing to save. No `Exception`: nobody must treat it as a failure."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name}; run the same command to continue")


class StopSignal:
    """The name of the signal that asked to stop, None so far."""

    def __init__(self) -> None:
        self.received: str | None = None

    def raise_if_requested(self) -> None:
        """Raise if a signal was received; to be called after saving.

        Raises:
            Preempted: SIGTERM or SIGUSR1 was received.
            KeyboardInterrupt: Ctrl-C was received.
        """
        if self.received == "SIGINT":
            raise KeyboardInterrupt
        if self.received is not None:
            raise Preempted(f"stopped by {self.received}; everything is saved: run the same command to continue")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """Collect SIGTERM, SIGUSR1 and Ctrl-C while the block runs; outside of the main thread, collect nothing.

    The second Ctrl-C stops at once, without saving.
    """
    stop = StopSignal()

    def remember(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.received == "SIGINT":
            raise KeyboardInterrupt
        stop.received = stop.received or signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, remember) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_at_once() -> None:
    """Let SIGTERM and SIGUSR1 raise `Stopped`, once, outside of `stop_on_signal`.

    Every stage survives being killed; this way files are closed, too, and the message says how to continue.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        ignore_stopping()  # closing takes a moment, and the signal may be sent to a process and to its group
        raise Stopped(signal.Signals(number).name)

    for number in _PREEMPTION:
        signal.signal(number, stop)


def ignore_stopping() -> None:
    """Ignore SIGTERM and SIGUSR1: the process is about to end, and has an exit code already."""
    for number in _PREEMPTION:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def helpers_ignore_sigusr1() -> Iterator[None]:
    """Let programs started in the block ignore SIGUSR1. Python's resource trackers ignore only SIGTERM and SIGINT."""
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # new programs inherit ignored signals
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


def leave_stopping_to_main_process() -> None:
    """Ignore SIGTERM and SIGUSR1 in a worker process unless its parent sends them, and SIGINT always.

    Slurm and terminals signal all processes of a command, but the parent needs its workers until it has saved
    everything.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PREEMPTION)  # a handler would not learn the sender
    threading.Thread(target=_end_when_parent_says_so, args=(_parent_pid(),), daemon=True).start()


def end_with_parent() -> None:
    """End this process within a second of its parent, even if `kill -9` ended that; not for forks of a server."""
    threading.Thread(target=_end_once_orphaned, args=(_parent_pid(),), daemon=True).start()


def _parent_pid() -> int:
    parent = multiprocessing.parent_process()  # `os.getppid()` may be a server that forked this process
    return os.getppid() if parent is None or parent.pid is None else parent.pid


def _end_when_parent_says_so(parent_pid: int) -> None:
    while signal.sigwaitinfo(_PREEMPTION).si_pid != parent_pid:
        pass
    os._exit(0)


def _end_once_orphaned(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)
