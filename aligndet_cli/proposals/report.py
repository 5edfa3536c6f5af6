"""Statistics of a store of proposals: number, size, share of the images covered, recall of labelled objects."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.artifacts.proposals import ProposalStore
from aligndet_cli.data.dataset import ImageSet
from aligndet_cli.proposals.filters import areas_of
from aligndet_cli.proposals.recall import measure_recall

_QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_MAX_SAMPLE = 200_000
_GRID = 64  # cells on each side of an image, to measure the share that proposals cover
_IMAGES_AT_ONCE = 64


def describe_store(
    store: ProposalStore, image_set: ImageSet, min_size: float, digests: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the report of a store as JSON; it depends on store and data alone.

    - `size_px` (square root of the area) and `aspect_ratio` (width / height) are measured on at most 200,000
      proposals, evenly spread.
    - `covered_share` is the share of an image that lies in at least one proposal.
    - `duplicate_images` counts image files with the same bytes as an earlier one.

    Args:
        min_size: see `measure_recall`.
        digests: hashes of the image files, in the order of the store.
    """
    counts, sample = store.counts, sample_boxes(store)
    sides = sample[:, 2:] - sample[:, :2]
    num_duplicates = len(digests) - len(set(digests))
    return {
        "images": len(store),
        "images_without_proposals": int((counts == 0).sum()),
        "duplicate_images": num_duplicates,
        "duplicate_share": _rounded(num_duplicates / max(len(store), 1)),
        "proposals": store.total,
        "proposals_per_image": _summary(counts),
        "size_px": _summary(np.sqrt(areas_of(sample))),
        "aspect_ratio": _summary(sides[:, 0] / sides[:, 1]),
        "covered_share": _summary(np.concatenate([np.zeros(0), *covered_shares(store)])),
        "labels": measure_recall(store, image_set, min_size) if image_set.has_labels else None,
    }


def sample_boxes(store: ProposalStore) -> NDArray[np.float32]:
    """Return at most 200,000 of all boxes, evenly spread: (N, 4) float32 xyxy."""
    step = max(1, -(-store.total // _MAX_SAMPLE))
    return np.array(store.boxes[::step])


def covered_shares(store: ProposalStore) -> Iterator[NDArray[np.float64]]:
    """Yield (B,) shares of images inside the union of their proposals, for some images at a time.

    Box edges are rounded to a grid of 64 x 64 cells, so a share is exact to about the width of a cell.
    """
    sizes_hw = np.array([entry.size_hw for entry in store.images()], dtype=np.float64).reshape(-1, 2)
    for start in range(0, len(store), _IMAGES_AT_ONCE):
        stop = min(start + _IMAGES_AT_ONCE, len(store))
        image = np.repeat(np.arange(stop - start), store.counts[start:stop])  # of each box
        boxes = store.boxes[store.offsets[start] : store.offsets[stop]]
        cells = np.rint(boxes * (_GRID / sizes_hw[start:stop][image][:, [1, 0, 1, 0]])).astype(np.int64)
        x1, y1, x2, y2 = np.clip(cells, 0, _GRID).T
        # Number of boxes over each cell: each box adds changes at its four corners, which are then summed up.
        corners = np.concatenate([(image * (_GRID + 1) + y) * (_GRID + 1) + x for y in (y1, y2) for x in (x1, x2)])
        changes = np.repeat([1.0, -1.0, -1.0, 1.0], len(boxes))
        shape = (stop - start, _GRID + 1, _GRID + 1)
        num_boxes = np.bincount(corners, changes, minlength=int(np.prod(shape))).reshape(shape)
        num_boxes = num_boxes.cumsum(axis=1).cumsum(axis=2)[:, :_GRID, :_GRID]
        yield (num_boxes > 0.5).mean(axis=(1, 2))


def _summary(values: NDArray[Any]) -> dict[str, float] | None:
    if not values.size:
        return None
    quantiles = np.quantile(values, list(_QUANTILES.values()))
    named = {name: _rounded(value) for name, value in zip(_QUANTILES, quantiles, strict=True)}
    return {"mean": _rounded(values.mean(dtype=np.float64)), **named}


def _rounded(value: float) -> float:
    return round(float(value), 4)
