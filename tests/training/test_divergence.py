"""Gradients that are not finite never reach the weights, whether one asks in every step or later."""

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aligndet_cli.data.sample import Sample
from aligndet_cli.errors import RunError
from aligndet_cli.processes.devices import Process
from aligndet_cli.training.divergence import Divergence
from aligndet_cli.training.dump import StepDump, dump_file, read_dump


def sample(index: int) -> Sample:
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    return Sample(index, index, image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def run_steps(gradients: list[float], folder: Path, *, is_deferred: bool) -> tuple[Tensor, Divergence]:
    """SGD with lr 1 from 0 with these gradients; the fused one heeds what a deferred check tells it."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    divergence = Divergence(Process(), folder, is_deferred=is_deferred)
    for step, gradient in enumerate(gradients):
        weight.grad = torch.tensor([gradient])
        loss = torch.tensor(10.0 * step + gradient)
        divergence.watch(optimizer, weight.grad.isfinite().all(), {"loss_a": loss}, [sample(step * 7)], step)
        optimizer.step()
    return weight.detach(), divergence


def test_deferred_nothing_moves_after_the_first_bad_step(tmp_path: Path) -> None:
    # -1, -2, then the infinite one, and a good one that comes too late.
    weight, divergence = run_steps([1.0, 2.0, float("inf"), 4.0], tmp_path, is_deferred=True)
    assert weight.item() == -3.0
    with pytest.raises(RunError, match=r"diverged at step 2: .*loss_a inf; images \[14\].*lower --lr"):
        divergence.check()
    written = json.loads((tmp_path / "diverged.json").read_text())
    assert written == {"step": 2, "ranks": [{"images": [14], "losses": {"loss_a": "inf"}}]}


def test_deferred_good_steps_go_on(tmp_path: Path) -> None:
    weight, divergence = run_steps([1.0, 2.0, 3.0], tmp_path, is_deferred=True)
    divergence.check()
    assert weight.item() == -6.0 and not list(tmp_path.iterdir())


def test_at_once_the_step_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"diverged at step 1: .*images \[7\]"):
        run_steps([1.0, float("nan"), 4.0], tmp_path, is_deferred=False)


def test_a_full_disk_does_not_hide_the_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    model = torch.nn.Linear(1, 1)
    dump = StepDump(tmp_path, {"model": model}, optimizer, torch.amp.GradScaler("cpu", enabled=False), 0, 1)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aligndet_cli.training.dump.write_bytes", fail)
    divergence = Divergence(Process(), tmp_path, is_deferred=False, dump=dump)
    divergence.begin_step()
    with pytest.raises(RunError, match="diverged at step 4"):
        divergence.watch(optimizer, torch.tensor(False), {"loss_a": torch.tensor(1.0)}, [sample(3)], 4)
    assert not dump_file(tmp_path).exists()


def test_buffers_are_those_before_the_step(tmp_path: Path) -> None:
    model = torch.nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    dump = StepDump(tmp_path, {"model": model}, optimizer, torch.amp.GradScaler("cpu", enabled=False), 7, 1)
    for _ in range(3):
        dump.remember()
        before = model.running_mean.clone()
        model(torch.rand(4, 2))
    dump.write(2)
    content = read_dump(tmp_path)
    assert torch.equal(content["state"]["model"]["running_mean"], before)
    assert not torch.equal(model.running_mean, before)
    assert (content["step"], content["seed"], content["world_size"]) == (2, 7, 1)


def test_deferred_the_dump_has_parameters_and_optimizer_of_before_the_first_bad_step(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5, fused=True)
    dump = StepDump(tmp_path, {"model": model}, optimizer, torch.amp.GradScaler("cpu", enabled=False), 0, 1)
    divergence = Divergence(Process(), tmp_path, is_deferred=True, dump=dump)
    for step, gradient in enumerate([1.0, 2.0, float("inf"), 4.0]):
        divergence.begin_step()
        model.weight.grad = torch.tensor([[gradient]])
        loss = torch.tensor(1.0)
        divergence.watch(optimizer, model.weight.grad.isfinite().all(), {"loss_a": loss}, [sample(step)], step)
        optimizer.step()
    with pytest.raises(RunError, match="diverged at step 2"):
        divergence.check()
    content = read_dump(tmp_path)
    # Velocities 1 and 2 + 0.5 * 1; the weight moves by both.
    assert (content["step"], content["state"]["model"]["weight"].item()) == (2, -3.5)
    assert content["optimizer"]["state"][0]["momentum_buffer"].item() == 2.5
