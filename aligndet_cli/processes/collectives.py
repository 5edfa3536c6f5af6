"""The few collectives the rest of the code needs; each is the identity in a single process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligndet_cli.processes.devices import Process


def mean_over_ranks(value: Tensor, process: Process) -> Tensor:
    """Mean of a tensor over all processes."""
    if process.world_size == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / process.world_size


def gather_over_ranks(value: Tensor) -> Tensor:
    """(N, ...) tensors of all processes, of the same shape, as one (world_size * N, ...) in the order of the ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def gather_objects(value: Any, process: Process) -> list[Any]:
    """The small plain values of all processes, in the order of the ranks."""
    if process.world_size == 1:
        return [value]
    values: list[Any] = [None] * process.world_size
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool, process: Process) -> bool:
    """Return True if the flag is set on any process, so that all of them act on it in the same step."""
    if process.world_size == 1:
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value)
    return bool(value.item() > 0)


def wait_for_all(process: Process) -> None:
    """Return once every process is here."""
    if process.world_size > 1:
        dist.barrier()
