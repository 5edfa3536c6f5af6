from pathlib import Path

import pytest

from aligndet_cli.data.toy import draw_toy_objects


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn objects in `train/CLASS` and `val/CLASS`: 23 and 13 images of five classes."""
    folder = tmp_path_factory.mktemp("objects")
    draw_toy_objects(folder, seed=0, num_train=23, num_val=13, size_hw=(40, 48))
    return folder
