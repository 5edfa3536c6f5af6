"""Tests that need a GPU; `ALIGNDET_GPU_TESTS_ON=cpu` runs them on a CPU, to see that they run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.gpu import IS_CPU

# torch looks at the first product of matrices in a process, and one of the tests wants deterministic ones.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))  # what torch says of a GPU is no fault of ours
            if not IS_CPU and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip("torch sees no GPU here"))


@pytest.fixture(autouse=True)
def plain_float32() -> Iterator[None]:
    """No TF32: results are compared with those of a CPU."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def undetermined() -> Iterator[None]:
    """A command makes its process deterministic; put it back."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]
