"""Join the group of processes that torchrun, Slurm or this program has started, or say who is missing."""

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from aligndet_cli.errors import RunError
from aligndet_cli.logs import logger
from aligndet_cli.processes.devices import Devices, own_device
from aligndet_cli.processes.ends import FULL_SHARED_MEMORY
from aligndet_cli.processes.launchers import Place, find_place

_SILENT_S = 5.0  # until a line says who is missing
_POLL_S = 0.2
_COUNT = "aligndet/joined"

# What gloo and c10d raise as a plain RuntimeError, in lower case. Gloo's messages name a place in its source, but for
# one: the second of two operations that wait hears of the first one's timeout in these words alone.
_OF_GROUPS = ("gloo", "application timeout caused pair closure", "operation timed out!")
_OF_TIMEOUTS = ("timed out", "timeout")


class LostPartner(RunError):
    """Another process ended, so this one had to; another process reports the cause."""


def init_process_group(devices: Devices) -> None:
    """Join the group of processes that the environment describes.

    Raises:
        RunError: not all of them came in time.
    """
    place = find_place(os.environ)
    assert place is not None
    if devices.kind == "cuda":
        torch.cuda.set_device(torch.device(own_device(devices)))
    backend = "cpu:gloo,cuda:nccl" if devices.kind == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=devices.timeout_minutes)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun starts all of them, or none
        with lost_partners(devices.timeout_minutes):
            dist.init_process_group(backend, timeout=timeout)
        return
    store = _meet(place, timeout)
    with lost_partners(devices.timeout_minutes):
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("aligndet", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )


def _meet(place: Place, timeout: datetime.timedelta) -> dist.Store:
    """Return the store that all processes share, once all have come to it."""
    waiting = _Waiting(place, timeout.total_seconds())
    if place.rank > 0:
        waiting.until(lambda: _is_listening(place), lambda: f"rank 0, at {place.address}:{place.port}")
    with lost_partners(timeout.total_seconds() / 60):
        try:
            store = dist.TCPStore(
                "localhost" if place.rank == 0 else place.address,
                place.port,
                place.world_size,
                is_master=place.rank == 0,
                timeout=timeout,
                wait_for_workers=False,
            )
        except dist.DistNetworkError as error:
            where = f"port {place.port} of {place.address}, where the processes meet"
            raise RunError(f"{where}: {str(error).splitlines()[0]}; another MASTER_PORT may be free") from None
        store.add(_COUNT, 1)
        waiting.until(
            lambda: store.add(_COUNT, 0) >= place.world_size,
            lambda: f"{place.world_size - store.add(_COUNT, 0)} of {place.world_size} processes",
        )
    return store


class _Waiting:
    """A wait for other processes that says who is missing, and ends. Python handles signals in it."""

    def __init__(self, place: Place, timeout_s: float) -> None:
        self.place, self.timeout_s, self.began, self.is_silent = place, timeout_s, time.monotonic(), True

    def until(self, is_over: Callable[[], bool], missing: Callable[[], str]) -> None:
        """Return once something is over.

        Args:
            missing: returns what is waited for.

        Raises:
            RunError: it takes longer than the timeout.
        """
        reasons = f"{' '.join(self.place.evidence)} say that there are {self.place.world_size} processes"
        while not is_over():
            waited_s = time.monotonic() - self.began
            if waited_s > self.timeout_s:
                raise RunError(
                    f"waited {self.timeout_s / 60:g} minutes for {missing()}; {reasons}: {self.place.remedy}"
                )
            if self.is_silent and waited_s > _SILENT_S:
                self.is_silent = False
                logger.info(f"waiting for {missing()} ({reasons}; if there are none: {self.place.remedy})")
            time.sleep(_POLL_S)


def _is_listening(place: Place) -> bool:
    try:
        socket.create_connection((place.address, place.port), timeout=1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def lost_partners(timeout_minutes: float) -> Iterator[None]:
    """Turn what torch raises when another process hangs or is gone into a RunError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not (isinstance(error, dist.DistError) or any(words in text for words in _OF_GROUPS)):
            raise
        rank = f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
        if "shared memory segment" in text:  # of NCCL
            raise RunError(f"{rank}{FULL_SHARED_MEMORY}set NCCL_SHM_DISABLE=1, which is slower") from None
        if any(words in text for words in _OF_TIMEOUTS):
            raise RunError(
                f"{rank}waited {timeout_minutes:g} minutes for another process of the run, which hangs; "
                "run the same command to continue (--set runtime.timeout_minutes to wait longer)"
            ) from None
        raise LostPartner(f"{rank}another process of the run is gone; see what it says") from None
