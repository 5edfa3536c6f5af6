"""Being asked to stop by SIGTERM, SIGUSR1 or Ctrl-C.

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
    """A stop was asked for where there was nothing to save. No `Exception`: nothing may take it for a failure."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name}; run the same command to continue")


class StopSignal:
    """Whether a stop was asked for, and by which signal."""

    def __init__(self) -> None:
        self.received: str | None = None

    def raise_if_requested(self) -> None:
        """Call after saving.

        Raises:
            Preempted: a stop was asked for.
            KeyboardInterrupt: by Ctrl-C.
        """
        if self.received == "SIGINT":
            raise KeyboardInterrupt
        if self.received is not None:
            raise Preempted(f"stopped by {self.received}; everything is saved: run the same command to continue")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """Collect SIGTERM, SIGUSR1 and Ctrl-C while the block runs (in the main thread; elsewhere nothing is collected).

    The second Ctrl-C does not wait for anything to be saved.
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
    """From now on SIGTERM and SIGUSR1 raise `Stopped`, once, outside of `stop_on_signal`.

    That is as good as being killed, which every stage survives, but closes what is open and tells how to go on.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        ignore_stopping()  # closing takes a moment, and the signal may come to a process and to its group
        raise Stopped(signal.Signals(number).name)

    for number in _PREEMPTION:
        signal.signal(number, stop)


def ignore_stopping() -> None:
    """From now on SIGTERM and SIGUSR1 do nothing: the process is about to end, and has an exit code already."""
    for number in _PREEMPTION:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def helpers_ignore_sigusr1() -> Iterator[None]:
    """Programs started in the block survive SIGUSR1. For the resource trackers, which see to SIGTERM and SIGINT."""
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # what is ignored remains so in a new program
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


def leave_stopping_to_main_process() -> None:
    """For a process that works for its parent: that one needs it until everything is saved, and then ends it.

    Slurm and terminals signal all processes of a command. Only a SIGTERM from the parent itself ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PREEMPTION)  # a handler would not learn who has sent it
    threading.Thread(target=_end_when_parent_says_so, args=(_parent_pid(),), daemon=True).start()


def end_with_parent() -> None:
    """From now on this process ends within a second of the one that started it, though that was ended by `kill -9`.

    Not for a process that a server has forked.
    """
    threading.Thread(target=_end_once_orphaned, args=(_parent_pid(),), daemon=True).start()


def _parent_pid() -> int:
    parent = multiprocessing.parent_process()  # who forked this one may be a server in between
    return os.getppid() if parent is None or parent.pid is None else parent.pid


def _end_when_parent_says_so(parent_pid: int) -> None:
    while signal.sigwaitinfo(_PREEMPTION).si_pid != parent_pid:
        pass
    os._exit(0)


def _end_once_orphaned(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)
