"""Collective operations over the processes of a run; each is the identity in a single process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligndet_cli.processes.devices import Process


def mean_over_ranks(value: Tensor, process: Process) -> Tensor:
    """Return the mean of a tensor (...) of any shape over all processes."""
    if process.world_size == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / process.world_size


def gather_over_ranks(value: Tensor) -> Tensor:
    """Concatenate the (N, ...) tensors of all processes, of equal shape, to (world_size * N, ...) by rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def gather_objects(value: Any, process: Process) -> list[Any]:
    """Return the values of all processes by rank; they are pickled, so keep them small."""
    if process.world_size == 1:
        return [value]
    values: list[Any] = [None] * process.world_size
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool, process: Process) -> bool:
    """Return True on all processes if the flag is set on any, so that they act on it in the same step."""
    if process.world_size == 1:
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value)
    return bool(value.item() > 0)


def wait_for_all(process: Process) -> None:
    """Return once every process is here."""
    if process.world_size > 1:
        dist.barrier()
