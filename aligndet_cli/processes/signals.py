"""Stop on SIGTERM, SIGUSR1, SIGHUP (the terminal was closed) and Ctrl-C, and end worker processes with their parent.

Loops collect the signal and check it once their work is saved (`stop_on_signal`); what they call and what may wait for
long looks at it meanwhile (`look_at_signals`). Elsewhere, where there is nothing to save, a signal ends the command at
once (`stop_at_once`). A signal that is ignored when the command starts, as under nohup, stays ignored.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from aligndet_cli.errors import Preempted

T = TypeVar("T")

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SIGNALS = (*PREEMPTION, signal.SIGINT)
POLL_S = 0.5  # longest time in which a wait does not look at signals
SAME_REQUEST_S = 1.0  # Slurm and `timeout` signal a process and its group: two signals, one request
_REACTION_S = 3.0  # time that a signal has to get through to Python code
_END = b"\0"


class Stopped(BaseException):
    """A signal asked to stop while there was nothing to save. No `Exception`: nobody must treat it as a failure."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name}; run the same command to continue")


class _Handled:
    """Count of the signals that have reached Python code, for the thread that watches them."""

    count = 0


_HANDLED = _Handled()


def note_handled() -> None:
    """Say that a handler of stop signals runs; every one of ours begins with it."""
    _HANDLED.count += 1


class StopSignal:
    """The name of the signal that asked to stop, None so far.

    Attributes:
        num_seen: signals that have reached Python code.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.num_seen = 0
        self._since = 0.0
        self._is_waiting = False

    @property
    def age_s(self) -> float:
        """Seconds since the signal was received; 0 without one."""
        return time.monotonic() - self._since if self.received is not None else 0.0

    def remember(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal: note the first one, and stop at once at the second.

        The second one of a process that another one of ours has started is for that one to act on.
        """
        note_handled()
        self.num_seen += 1
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
            if self._is_waiting:
                self.raise_in_wait()
        elif multiprocessing.parent_process() is not None:
            return
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif self.age_s > SAME_REQUEST_S:
            raise Stopped(signal.Signals(number).name)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise at once when a signal arrives in the block, see `raise_in_wait`."""
        self._is_waiting = True
        try:
            self.raise_in_wait()
            yield
        finally:
            self._is_waiting = False

    def raise_if_requested(self) -> None:
        """Raise if a signal was received; to be called after saving.

        Raises:
            Preempted: SIGTERM, SIGUSR1 or SIGHUP was received.
            KeyboardInterrupt: Ctrl-C was received.
        """
        self._raise("everything is saved: run the same command to continue")

    def raise_in_wait(self) -> None:
        """Raise as `raise_if_requested` does, where the work since the last save is lost."""
        self._raise("run the same command to continue")

    def _raise(self, advice: str) -> None:
        if self.received == "SIGINT":
            raise KeyboardInterrupt
        if self.received is not None:
            raise Preempted(f"stopped by {self.received}; {advice}")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """Collect SIGTERM, SIGUSR1, SIGHUP and Ctrl-C while the block runs; outside of the main thread, collect nothing.

    A second signal stops at once, without saving.
    """
    stop = StopSignal()
    with handled_by(stop.remember, *_SIGNALS):
        yield stop


@contextlib.contextmanager
def handled_by(handler: "signal._HANDLER", *numbers: signal.Signals) -> Iterator[None]:
    """Let a handler have those of the signals that are not ignored, while the block runs; in the main thread only."""
    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in numbers if is_main and not is_ignored(number)}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


def is_ignored(number: signal.Signals) -> bool:
    """Return True if the process ignores a signal."""
    return signal.getsignal(number) is signal.SIG_IGN


def look_at_signals(patience_s: float = 0.0) -> None:
    """Raise if `stop_on_signal` has collected a signal; to be called in a wait, every `POLL_S` seconds.

    Args:
        patience_s: seconds since the signal for which what is waited for may still come.

    Raises:
        Preempted: SIGTERM, SIGUSR1 or SIGHUP was received.
        KeyboardInterrupt: Ctrl-C was received.
    """
    stop = _collector()
    if stop is not None and stop.age_s >= patience_s:
        stop.raise_in_wait()


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """Yield items whose making can be left anywhere: a signal that `stop_on_signal` collects raises there at once.

    Raises:
        Preempted, KeyboardInterrupt: see `look_at_signals`.
    """
    iterator = iter(items)
    with contextlib.suppress(StopIteration):
        while True:
            stop = _collector()
            with stop.raising() if stop is not None else contextlib.nullcontext():
                item = next(iterator)
            yield item


def _collector() -> StopSignal | None:
    """Return the object that collects signals now."""
    return next((stop for number in _SIGNALS if (stop := _collector_of(number)) is not None), None)


def _collector_of(number: int) -> StopSignal | None:
    collector = getattr(signal.getsignal(number), "__self__", None)
    return collector if isinstance(collector, StopSignal) else None


def stop_at_once() -> None:
    """Let SIGTERM, SIGUSR1 and SIGHUP raise `Stopped`, once, outside of `stop_on_signal`.

    Every stage survives being killed; this way files are closed, too, and the message says how to continue.
    """
    for number in PREEMPTION:
        if not is_ignored(number):
            signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    note_handled()
    ignore_stopping()  # closing takes a moment, and the signal may be sent to a process and to its group
    raise Stopped(signal.Signals(number).name)


def ignore_stopping() -> None:
    """Ignore SIGTERM, SIGUSR1 and SIGHUP: the process is about to end, and has an exit code already."""
    for number in PREEMPTION:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def end_if_out_of_reach() -> Iterator[None]:
    """End the process if a signal that must end it at once does not get through while the block runs.

    Python handles signals between its own instructions only, so a process that waits in a library, say for another
    one that hangs, would never hear of them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, _END)
        watcher.join()
        os.close(reader)
        os.close(writer)


def _watch(arrivals: int) -> None:
    """End the process `_REACTION_S` after a signal that should have ended it.

    Args:
        arrivals: file to read a byte from for every signal, and `_END` at the end.
    """
    stop, first, handled = None, 0.0, _HANDLED.count
    while (received := os.read(arrivals, 1)) != _END:
        number = signal.Signals(received[0])
        now, before, stop = time.monotonic(), stop, _collector_of(number)
        is_first = stop is not None and stop is not before
        first = now if is_first else first
        is_repeated = stop is not None and number != signal.SIGINT and now - first <= SAME_REQUEST_S
        if is_first or is_repeated or (stop is None and signal.getsignal(number) is not _stop):
            select.select([arrivals], [], [], POLL_S)  # time to be handled in, so that the next one finds it counted
        else:
            select.select([arrivals], [], [], _REACTION_S)
            if _HANDLED.count == handled:
                _end_now(number)
        handled = _HANDLED.count


def _end_now(number: signal.Signals) -> None:
    if number == signal.SIGINT:
        os._exit(130)
    print(f"error: {Stopped(number.name)}", file=sys.stderr, flush=True)
    os._exit(Preempted.exit_code)


@contextlib.contextmanager
def helpers_ignore_stopping() -> Iterator[None]:
    """Let programs started in the block ignore all stop signals; Python's resource trackers ignore only two of them."""
    with handled_by(signal.SIG_IGN, signal.SIGUSR1, signal.SIGHUP):  # new programs inherit ignored signals
        yield


@contextlib.contextmanager
def no_signals() -> Iterator[None]:
    """Put off stop signals to the end of the block. Processes that are forked in it start with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_stopping_to_main_process() -> None:
    """Ignore SIGTERM, SIGUSR1 and SIGHUP in a worker process unless its parent sends them, and SIGINT always.

    Slurm and terminals signal all processes of a command, but the parent needs its workers until it has saved
    everything.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION)  # a handler would not learn the sender
    threading.Thread(target=_end_when_parent_says_so, args=(_parent_pid(),), daemon=True).start()


def end_with_parent() -> None:
    """End this process within a second of its parent, even if `kill -9` ended that; not for forks of a server."""
    threading.Thread(target=_end_once_orphaned, args=(_parent_pid(),), daemon=True).start()


def _parent_pid() -> int:
    parent = multiprocessing.parent_process()  # `os.getppid()` may be a server that forked this process
    return os.getppid() if parent is None or parent.pid is None else parent.pid


def _end_when_parent_says_so(parent_pid: int) -> None:
    while signal.sigwaitinfo(PREEMPTION).si_pid != parent_pid:
        pass
    os._exit(0)


def _end_once_orphaned(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)
