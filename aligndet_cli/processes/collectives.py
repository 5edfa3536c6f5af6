"""Collective operations over the processes of a run; each is the identity in a single process.

Waits for other processes look at signals, but where the values lie on a GPU: there, they are not waited for here.
"""

import datetime
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligndet_cli.processes.devices import Process
from aligndet_cli.processes.signals import POLL_S, look_at_signals

PATIENCE_S = 10.0  # for other processes, once a signal asks to stop: they may be in the middle of a step


def mean_over_ranks(value: Tensor, process: Process) -> Tensor:
    """Return the mean of a tensor (...) of any shape over all processes."""
    if process.world_size == 1:
        return value
    total = value.detach().clone()
    _finish(dist.all_reduce(total, async_op=True), total)
    return total / process.world_size


def gather_over_ranks(value: Tensor) -> Tensor:
    """Concatenate the (N, ...) tensors of all processes, of equal shape, to (world_size * N, ...) by rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    _finish(dist.all_gather(parts, value.contiguous(), async_op=True), value)
    return torch.cat(parts)


def gather_objects(value: Any, process: Process) -> list[Any]:
    """Return the values of all processes by rank; they are pickled, so keep them small."""
    if process.world_size == 1:
        return [value]
    return [_broadcast(value, rank) for rank in range(process.world_size)]


def value_of_main(value: Any) -> Any:
    """Return the value of rank 0, which is pickled; the others' is not looked at."""
    return _broadcast(value, 0)


def any_rank(flag: bool, process: Process) -> bool:
    """Return True on all processes if the flag is set on any, so that they act on it in the same step."""
    if process.world_size == 1:
        return flag
    value = torch.tensor(float(flag))
    _finish(dist.all_reduce(value, async_op=True), value)
    return bool(value.item() > 0)


def wait_for_all(process: Process, *, patience_s: float = PATIENCE_S) -> None:
    """Return once every process is here.

    Args:
        patience_s: see `look_at_signals`.
    """
    if process.world_size > 1:
        value = torch.zeros(())
        _finish(dist.all_reduce(value, async_op=True), value, patience_s)


def _broadcast(value: Any, source: int) -> Any:
    """Return the value of a rank, on all of them."""
    content = pickle.dumps(value) if dist.get_rank() == source else b""
    size = torch.tensor(len(content))
    _finish(dist.broadcast(size, source, async_op=True), size)
    data = (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(int(size), dtype=torch.uint8)
    )
    _finish(dist.broadcast(data, source, async_op=True), data)
    return pickle.loads(data.numpy().tobytes())


def _finish(work: dist.Work | None, value: Tensor, patience_s: float = PATIENCE_S) -> None:
    """Wait for the other processes.

    Raises:
        Preempted, KeyboardInterrupt: asked to stop while they do not come.
        RuntimeError: they are gone, or did not come in time.
    """
    assert work is not None, "called by a process of the group"
    if value.is_cuda:
        work.wait()
        return
    while True:
        try:
            work.wait(datetime.timedelta(seconds=POLL_S))
            return
        except RuntimeError:
            if work.is_completed():  # it failed, or was done just after this wait had given up
                work.wait()
                return
        look_at_signals(patience_s)
