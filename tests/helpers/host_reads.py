"""Counts where a piece of work makes the host wait for the device, and how many kernels it launches.

On a GPU, torch tells of each wait (`set_sync_debug_mode`). On a CPU nothing waits, so the calls are counted that would
make a GPU's host wait: those that read a number or a size from a tensor.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import aligndet_cli
from aligndet_cli.detectors.parts import matching, points
from aligndet_cli.pretrain_box import contrastive

PACKAGE = Path(aligndet_cli.__file__).parent
# Their results have sizes, or are numbers, that the host has to know.
_READS = {"nonzero", "_local_scalar_dense", "masked_select", "bincount", "_unique2", "equal", "nms", "_linalg_eigh"}
_METHODS = {"tolist", "cpu", "new_tensor"}  # they leave no trace of an operation where the tensor is on a CPU


def host_reads(work: Callable[[], object], device: torch.device | str) -> Counter[str]:
    """Return how often the host waits, by the line of the package that makes it, and the two that led there.

    `detectors/parts/sampling.py:63 places_in_rows < detectors/retinanet.py:124 _losses < ...`
    """
    return _told_by_cuda(work) if torch.device(device).type == "cuda" else _counted(work)


def operations(work: Callable[[], object]) -> int:
    """Return how many operations compute or copy something: each is a kernel that the host launches on a GPU.

    Counted on a CPU, whose images are matched all at once here, as on a GPU.
    """

    def all_at_once(num_images: int, _device: torch.device) -> list[slice]:
        return [slice(0, num_images)]

    with ExitStack() as patches:
        for module in (matching, points):
            patches.enter_context(mock.patch.object(module, "image_groups", all_at_once))
            patches.enter_context(mock.patch.dict(module.BOXES_AT_ONCE, cpu=module.BOXES_AT_ONCE["cuda"]))
        patches.enter_context(mock.patch.dict(contrastive.BLOCK_BYTES, cpu=contrastive.BLOCK_BYTES["cuda"]))
        counted = patches.enter_context(_Kernels())
        work()
    return counted.number


def shown(reads: Counter[str]) -> str:
    """The places, most frequent first, for messages."""
    return "".join(f"\n{count:4d} x {place}" for place, count in reads.most_common())


def _told_by_cuda(work: Callable[[], object]) -> Counter[str]:
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[_place()] += 1  # called where the warning is raised, so the stack says who it was

    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return found


def _counted(work: Callable[[], object]) -> Counter[str]:
    found: Counter[str] = Counter()
    with _Operations(found), _Methods(found):
        work()
    return found


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads(func, args, kwargs or {}):
            self.found[_place()] += 1
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        # A result that shares memory with an argument, and is not written to, is another view of it.
        self.number += not returned or any(one.alias_info is None or one.alias_info.is_write for one in returned)
        return func(*args, **(kwargs or {}))


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    name = func.overloadpacket.__name__
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_"):  # a mask is first turned into places
        has_mask = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return has_mask and not (name != "index" and args[2].dim() == 0)  # one value for all is filled in
    return name in _READS


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _METHODS:
            self.found[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The three innermost lines of the package on the stack, else that of the caller's file."""
    frame, here = sys._getframe(1), __file__
    outer, inner = "?", []
    while frame is not None and len(inner) < 3:
        file = frame.f_code.co_filename
        if Path(file).is_relative_to(PACKAGE):
            inner.append(f"{Path(file).relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}")
        if file != here and outer == "?":
            outer = f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return " < ".join(inner) or outer
