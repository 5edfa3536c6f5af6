"""A model on the device of its process: its layout, precision, compilation, and gradients over processes."""

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.processes.devices import Process


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
