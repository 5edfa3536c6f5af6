"""An interrupted run that goes on with another number of processes sees the same images in every step."""

import functools
import json
from pathlib import Path

import pytest
import torch

from aligndet_cli.errors import Preempted
from aligndet_cli.processes.devices import Devices
from aligndet_cli.processes.launch import Shown, launch
from helpers.linear_learner import BATCH, NUM_STEPS, PLAN, LeastSquares, run

pytestmark = pytest.mark.e2e


def train(folder: Path, processes: int, stop_after: int | None = None) -> None:
    body = functools.partial(run, folder=folder, stop_after=stop_after)
    launch(body, PLAN, Devices("cpu", per_node=processes), Shown("none"))


def order_of(folder: Path) -> list[list[int]]:
    """All places in the order of the stream, whoever took them."""
    lines = sorted(json.loads(line) for line in (folder / "order.jsonl").read_text().splitlines())
    return [place for _, _, places in lines for place in places]


def test_one_then_two_then_one(tmp_path: Path) -> None:
    alone, changing = tmp_path / "alone", tmp_path / "changing"
    for folder in (alone, changing):
        folder.mkdir()
    train(alone, 1)
    for processes, stop_after in ((1, 3), (2, 6)):
        with pytest.raises(Preempted, match="stopped by SIGTERM; everything is saved"):
            train(changing, processes, stop_after)
        assert sorted((changing / "resume").glob("step-*.pt"))[-1].stem == f"step-{stop_after:09d}"
    train(changing, 1)
    assert len(order_of(alone)) == NUM_STEPS * BATCH
    assert order_of(changing) == order_of(alone)
    expected, found = (torch.load(folder / "weights.pt") for folder in (alone, changing))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected["linear.weight"], LeastSquares().linear.weight, atol=0.1)  # it did train
