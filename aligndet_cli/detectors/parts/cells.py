"""Pick single cells out of a pyramid, without rearranging whole maps."""

from collections.abc import Sequence

import torch
from torch import Tensor


def grids_of(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return rows and columns of each map (B, C, H, W)."""
    return [(level.shape[-2], level.shape[-1]) for level in maps]


def image_index_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return (S,) int64 image numbers of candidates that are listed image by image; S is the sum of `counts`."""
    index = torch.arange(len(counts), device=device)
    return index.repeat_interleave(send(counts, device), output_size=sum(counts))


def send(values: Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Return a few numbers as (N,) or (N, M) on a device, without waiting for it as `torch.tensor(device=...)` does."""
    return torch.tensor(values).to(device, non_blocking=True)


def gather_cells(maps: Sequence[Tensor], image_index: Tensor, cell_index: Tensor) -> Tensor:
    """Return the (S, C) vectors of chosen cells.

    Every map takes part in the graph even if none of its cells is chosen, so its gradient is zero and not missing
    (distributed training waits for a gradient of every parameter).

    Args:
        maps: (B, C, H, W) each, finest first.
        image_index: (S,) int64 position in the batch.
        cell_index: (S,) int64, counted over all maps of an image: levels, then rows, then columns.
    """
    found, start = maps[0].new_empty(0), 0
    for level in maps:
        rows, columns = level.shape[-2:]
        cell = cell_index - start
        is_here = (cell >= 0) & (cell < rows * columns)
        # The others read cells that do not count, so that a GPU's host need not know how many are here. They are spread
        # over the map: gradients at one place are added one after the other.
        cell = cell.remainder(rows * columns)
        picked = level[image_index, :, cell // columns, cell % columns]  # (S, C)
        found = torch.where(is_here[:, None], picked, found) if start else picked
        start += rows * columns
    return found


def gather_slots(maps: Sequence[Tensor], image_index: Tensor, candidate_index: Tensor, num_slots: int) -> Tensor:
    """Return the (S, V) float32 values of chosen candidates, A of which share a cell; see `gather_cells`.

    Args:
        maps: (B, A*V, H, W) each, finest first.
        image_index: (S,) int64 position in the batch.
        candidate_index: (S,) int64, counted over all maps of an image: levels, rows, columns, then slots.
        num_slots: A.
    """
    cells = gather_cells(maps, image_index, candidate_index // num_slots).unflatten(1, (num_slots, -1))  # (S, A, V)
    return cells[torch.arange(len(cells), device=cells.device), candidate_index % num_slots].float()
