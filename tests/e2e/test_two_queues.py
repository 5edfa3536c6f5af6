"""MoCo's queue on two gloo processes: the same on both, with the keys of both."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aligndet_cli.config import RuntimeConfig
from aligndet_cli.processes.devices import Devices
from aligndet_cli.processes.launch import Shown, launch
from helpers.two_ranks import fill_queue

pytestmark = pytest.mark.e2e


def test_both_ranks_have_the_keys_of_both(tmp_path: Path) -> None:
    plan = SimpleNamespace(config=SimpleNamespace(runtime=RuntimeConfig()))
    launch(functools.partial(fill_queue, folder=tmp_path), plan, Devices("cpu", per_node=2), Shown("none"))
    first, second = (torch.load(tmp_path / f"queue{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["queue"], second["queue"])
    # Two keys per rank and step: the four of the second step go behind those of the first, round the end.
    steps = [torch.cat([first["keys"][step], second["keys"][step]]) for step in (0, 1)]
    expected = torch.cat([steps[1][2:], steps[0][2:], steps[1][:2]])
    torch.testing.assert_close(first["queue"], expected)
