from pathlib import Path

import numpy as np
import pytest

from aligndet_cli.artifacts.clusters import ClusterLabels
from aligndet_cli.errors import DataError


def test_rows_and_number_of_clusters_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.array([3, 0, 2, 3, 1], dtype=np.int16))
    (tmp_path / "report.json").write_text('{"k": 7}')  # some may be dead
    labels = ClusterLabels(tmp_path)
    assert (len(labels), labels.num_clusters) == (5, 7)
    assert labels.of_rows(1, 4).tolist() == [0, 2, 3] and labels.of_rows(1, 4).dtype == np.int64
    assert labels.of_rows(2, 2).tolist() == []


@pytest.mark.parametrize("content", [None, b"not an array"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "labels.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.npy: cannot be read .*aligndet cluster"):
        len(ClusterLabels(tmp_path))
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(DataError, match=r"report\.json: cannot be read .*aligndet cluster"):
        _ = ClusterLabels(tmp_path).num_clusters
