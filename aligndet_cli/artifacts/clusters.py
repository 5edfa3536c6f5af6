"""Read access to finished clusters for the stages that train on them. Free of torch and scikit-learn."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.errors import DataError


@dataclass(frozen=True)
class ClusterLabels:
    """The cluster of each proposal, in the order of the proposals' store; mapped into memory, not loaded.

    A process that receives it pickled maps the file again.
    """

    folder: Path

    def __reduce__(self) -> tuple[type["ClusterLabels"], tuple[Path]]:
        return ClusterLabels, (self.folder,)

    def __len__(self) -> int:
        """Return the number of proposals."""
        return len(self._labels)

    @functools.cached_property
    def num_clusters(self) -> int:
        """K, the number of clusters; some may be empty.

        Raises:
            DataError: the report cannot be read.
        """
        file = self.folder / "report.json"
        try:
            return int(json.loads(file.read_text(encoding="utf-8"))["k"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(file, error) from None

    def of_rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the cluster ids (stop - start,) int64, 0..K-1, of rows of the store."""
        return np.asarray(self._labels[start:stop], dtype=np.int64)

    @functools.cached_property
    def _labels(self) -> NDArray[np.integer]:
        file = self.folder / "labels.npy"
        try:
            labels: NDArray[np.integer] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise _unreadable(file, error) from None
        return labels


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: cannot be read ({error}); delete its folder and run `aligndet cluster`")
