import io
from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.arrays import save_array


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0, dtype=np.float32).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.zeros((0, 4), np.float16),
        np.array([True, False]),
        np.array(3.5),
    ],
)
def test_an_array_is_written_as_numpy_writes_it(tmp_path: Path, array: np.ndarray) -> None:
    expected = io.BytesIO()
    np.save(expected, array.copy(order="C"))
    save_array(tmp_path / "a.npy", array)
    assert (tmp_path / "a.npy").read_bytes() == expected.getvalue()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
