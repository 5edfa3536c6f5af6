from pathlib import Path

import pytest
import torch

# Two cores: one thread per test process is faster than two that wait for each other, and the sums are the same.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real data sets `minicoco` and `bccd`, kept beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data (shared/data) is not beside this checkout")
    return folder
