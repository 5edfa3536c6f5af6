"""Being asked to stop: SIGTERM and SIGUSR1 set a flag that every loop checks once its work is saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from aligndet_cli.errors import Preempted


class StopSignal:
    """Whether a stop was asked for, and by which signal."""

    def __init__(self) -> None:
        self.received: str | None = None

    def raise_if_requested(self) -> None:
        """Call after saving.

        Raises:
            Preempted: a stop was asked for.
        """
        if self.received is not None:
            raise Preempted(f"stopped by {self.received}; everything is saved: run the same command to continue")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """Collect SIGTERM and SIGUSR1 while the block runs (in the main thread; elsewhere the flag stays unset)."""
    stop = StopSignal()

    def remember(number: int, _frame: FrameType | None) -> None:
        stop.received = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
