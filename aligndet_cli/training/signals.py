"""Being asked to stop: SIGTERM, SIGUSR1 and Ctrl-C set a flag that every loop checks once its work is saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from aligndet_cli.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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
        stop.received = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, remember) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
