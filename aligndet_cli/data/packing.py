"""Values with tensors as one block of bytes: passing, pinning and copying cost time per tensor, not per byte."""

import io
import pickle
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; of the first element of every tensor in the block


@dataclass(frozen=True)
class Packed:
    """A pickled value, and its tensors beside it.

    Attributes:
        head: the value with a place in the block instead of each tensor.
        tensors: contiguous, by place.
        size: bytes of the block.
    """

    head: bytes
    tensors: dict[int, Tensor]
    size: int

    def write(self, file: BinaryIO) -> None:
        """Write the block to a new, unbuffered file, whose gaps are zeros."""
        for place, tensor in self.tensors.items():
            file.seek(place)
            left = _bytes_of(tensor).numpy().data
            while left:  # the system writes 2 GB at most
                left = left[file.write(left) :]
        file.truncate(self.size)

    def copy_to(self, block: Tensor) -> None:
        """Write the block to a tensor (N,) uint8."""
        for place, tensor in self.tensors.items():
            block[place : place + tensor.nbytes] = _bytes_of(tensor)


class _Packer(pickle.Pickler):
    """Pickles all but tensors, which it collects."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[int, Tensor] = {}
        self.size = 0

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        """Return what is pickled instead of a tensor."""
        if not isinstance(value, Tensor):
            return None
        place = self.size
        self.tensors[place] = value.contiguous()
        # An empty one takes a place, too, so that no two have the same.
        self.size += max(-(-value.nbytes // _ALIGNMENT), 1) * _ALIGNMENT
        return place, value.dtype, tuple(value.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, head: bytes, block: Tensor) -> None:
        super().__init__(io.BytesIO(head))
        self.block = block

    def persistent_load(self, what: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        """Return the view of the block that `persistent_id` has described."""
        place, dtype, shape = what
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.block[place : place + size].view(dtype).view(shape)


def pack(value: Any) -> Packed:
    """Take the tensors out of a value that can be pickled; they must lie in the memory of the CPU."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    return Packed(file.getvalue(), packer.tensors, packer.size)


def unpack(head: bytes, block: Tensor) -> Any:
    """Return the value with views of the block (N,) uint8 as its tensors."""
    return _Unpacker(head, block).load()


def into_pinned_memory(block: Tensor) -> Tensor:
    """Return a copy of a block (N,) uint8 in pinned memory, from which copies to a GPU do not wait."""
    return torch.empty(len(block), dtype=block.dtype, pin_memory=True).copy_(block)


def pin(value: Any) -> Any:
    """Return a copy of a value whose tensors lie in one block of pinned memory."""
    packed = pack(value)
    block = torch.empty(packed.size, dtype=torch.uint8)
    packed.copy_to(block)
    return unpack(packed.head, into_pinned_memory(block))


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as (bytes,) uint8."""
    # `reshape` would keep the odd strides of tensors with a single element.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
