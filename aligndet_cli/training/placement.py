"""Put a model on the device of its process: memory layout, precision, compilation, gradients over processes."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.processes.devices import Process

_MOST_COMPILATIONS = 256  # networks of two detectors, with and without gradient, and for maps of a single row or cell


def place(model: nn.Module, process: Process) -> None:
    """Move a model to the device of the process, in place and channels last.

    With several GPUs, batch norms become SyncBN, which uses the batch of all GPUs as the paper does (docs/paper.md
    §5.6). torch has no SyncBN for CPUs, where batch norms stay local.
    """
    if process.world_size > 1 and process.device.startswith("cuda"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(torch.device(process.device))
    model.to(memory_format=torch.channels_last)


def compile_parts(detectors: Sequence[nn.Module], runtime: RuntimeConfig) -> None:
    """Compile the networks of detectors for any image size (`--compile`), but not matching and sampling."""
    if runtime.compile:
        # torch counts the compilations of all modules together, and beyond the limit (8) goes on without any.
        torch._dynamo.config.recompile_limit = _MOST_COMPILATIONS
        for detector in detectors:
            for network in networks_of(detector):
                network.compile(dynamic=True)


def networks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost parts with weights that are called: of a list of modules, or a head of towers, what is in it.

    What is not called itself cannot be compiled.
    """
    for child in model.children():
        if not any(True for _ in child.parameters()):
            continue  # anchors and points belong to the matching
        if type(child).forward is nn.Module.forward:
            yield from networks_of(child)
        else:
            yield child


def wrap(model: nn.Module, process: Process) -> nn.Module:
    """Wrap the module so that gradients are averaged over processes; return it as it is in a single process.

    Every trainable parameter must get a gradient in every step: a parameter without one is a bug, and fails.
    """
    if process.world_size == 1:
        return model
    device_ids = [torch.device(process.device)] if process.device.startswith("cuda") else None
    parameters = inspect.signature(DistributedDataParallel).parameters
    # Newer versions of torch warn about the old name.
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    settings: dict[str, Any] = {sync_buffers: False}
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **settings)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a forward pass in a precision: `32-true`, `bf16-mixed` or `16-mixed`."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
