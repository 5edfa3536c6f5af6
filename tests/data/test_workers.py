import errno
import os
import signal
from typing import Any

import pytest
import torch

from aligndet_cli.data.workers import results_in_order
from aligndet_cli.errors import DataError, RunError


def double(number: int) -> torch.Tensor:
    return torch.tensor([2 * number])


def test_results_come_in_the_order_of_tasks() -> None:
    assert [int(value) for value in results_in_order(double, range(30), 3)] == list(range(0, 60, 2))


def fail(_task: int) -> None:
    raise DataError("no such image")


def test_an_error_of_the_function_is_that_of_the_caller() -> None:
    with pytest.raises(DataError, match="^no such image$"):
        list(results_in_order(fail, range(3), 2))


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed, most likely by the system because memory ran out"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"crashed \(SIGSEGV\)"),
        (lambda: os._exit(3), r"ended by itself \(exit code 3\)"),
    ],
)
def test_the_end_of_a_worker_is_told(end: Any, told: str) -> None:
    with pytest.raises(RunError, match=f"^a process that reads images {told}"):
        list(results_in_order(lambda _: end(), range(9), 2))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.ENOMEM])
def test_what_fails_in_handing_over_is_told(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(RunError, match=rf"cannot hand over a batch \({os.strerror(number)}\).*--num-workers 0"):
        list(results_in_order(double, range(9), 2))


def test_where_files_in_memory_are_forbidden_they_are_in_the_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(_name: str) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "memfd_create", forbid)
    assert [int(value) for value in results_in_order(double, range(4), 1)] == [0, 2, 4, 6]
