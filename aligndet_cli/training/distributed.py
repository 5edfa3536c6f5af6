"""The few collectives the rest of the code needs; each is the identity in a single process."""

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.training.launch import Process


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


def wrap(model: nn.Module, process: Process) -> nn.Module:
    """The module with gradients averaged over processes; unchanged in a single process.

    Every trainable parameter must get a gradient in every step: unused ones are a bug that this makes visible.
    """
    if process.world_size == 1:
        return model
    device_ids = [torch.device(process.device)] if process.device.startswith("cuda") else None
    parameters = inspect.signature(DistributedDataParallel).parameters
    # Newer versions of torch warn about the old name.
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    settings: dict[str, Any] = {sync_buffers: False}
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **settings)


def place(model: nn.Module, process: Process) -> None:
    """Move a model to the device of the process, in place: channels last, SyncBN where GPUs share a batch.

    SyncBN computes the statistics of the batch over all GPUs, as the paper does (docs/paper.md §5.6). On CPU processes
    batch norms stay local: torch has no SyncBN there.
    """
    if process.world_size > 1 and process.device.startswith("cuda"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(torch.device(process.device))
    model.to(memory_format=torch.channels_last)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a forward pass in a precision: `32-true`, `bf16-mixed` or `16-mixed`."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def compile_parts(detectors: Sequence[nn.Module], runtime: RuntimeConfig) -> None:
    """`--compile`: the convolutional parts of detectors, for any image size; matching and sampling stay as they are."""
    if not runtime.compile:
        return
    for detector in detectors:
        for part in detector.children():
            part.compile(dynamic=True)
