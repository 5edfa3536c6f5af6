"""Waits for other processes."""

import datetime
from typing import Any

import pytest
import torch

from aligndet_cli.processes.collectives import _finish


class Work:
    """A collective operation whose first wait gives up, and which then is over at once."""

    def __init__(self, *, fails: bool) -> None:
        self.fails, self.num_waits = fails, 0

    def wait(self, timeout: datetime.timedelta | None = None) -> None:
        self.num_waits += 1
        if self.num_waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.fails:
            raise RuntimeError("Connection closed by peer")

    def is_completed(self) -> bool:
        return True


def finish(work: Any) -> None:
    _finish(work, torch.zeros(()))


def test_a_wait_that_gave_up_just_before_the_others_came_is_no_failure() -> None:
    work = Work(fails=False)
    finish(work)
    assert work.num_waits == 2


def test_a_failure_is_told_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="closed by peer"):
        finish(Work(fails=True))
