"""Arrays in files, written all or nothing."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligndet_cli.files import write_bytes


def save_array(file: Path, array: NDArray[Any]) -> None:
    """Write an array of any shape as `np.save` does, but atomically and without a second copy in memory."""
    array, header = np.asarray(array, order="C"), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write_bytes(file, header.getvalue(), array.reshape(-1).view(np.uint8).data)


def save_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Write an `.npz` atomically; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(file, buffer.getvalue())
