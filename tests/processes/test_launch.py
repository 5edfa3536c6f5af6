import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligndet_cli import driver
from aligndet_cli.config import RuntimeConfig
from aligndet_cli.errors import ConfigError, RunError
from aligndet_cli.processes.devices import Devices, Process, own_device, resolve_devices
from aligndet_cli.processes.launch import Shown, launch
from helpers.commandline import aligndet

PLAN = SimpleNamespace(config=SimpleNamespace(runtime=RuntimeConfig()))


def test_sums_over_repeated_indices_are_the_same_every_time_with_two_threads() -> None:
    # As in picking the features of sampled anchors, many of which share a place. Left alone, torch adds them up in
    # the order its threads get to them: over 50 different results in 60 tries.
    results = set()

    def run(_plan: Any, _process: Process) -> None:
        torch.set_num_threads(2)
        features = torch.randn(3200, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        index = torch.randint(0, 3200, (8192,), generator=torch.Generator().manual_seed(1))
        weights = torch.randn(8192, 64, generator=torch.Generator().manual_seed(2))
        for _ in range(20):
            features.grad = None
            features[index].backward(weights)
            assert features.grad is not None
            results.add(features.grad.numpy().tobytes())

    try:
        launch(run, PLAN, Devices(), Shown("none"))
    finally:
        torch.set_num_threads(1)
    assert len(results) == 1


@pytest.mark.parametrize(("words", "expected"), [((), None), (("--deterministic",), ":4096:8")])
def test_products_are_asked_for_before_a_gpu_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], expected: str | None
) -> None:
    """torch looks once in a process, and `--batch-size auto` takes steps while the run is prepared."""
    seen = []

    def prepare(*_: Any) -> None:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise RunError("far enough")

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(driver, "_prepare", prepare)
    ran = aligndet("pretrain-image", tmp_path, "-w", tmp_path / "work", "--batch-size", "auto", *words, code=1)
    assert "far enough" in ran.error_line() and seen == [expected]


@pytest.mark.parametrize(("devices", "expected"), [("auto", 1), ("1", 1), ("3", 3)])
def test_processes_on_the_cpu(devices: str, expected: int) -> None:
    assert resolve_devices(RuntimeConfig(accelerator="cpu", devices=devices)).world_size == expected


@pytest.mark.parametrize("devices", ["0", "-1", "many", "0,x"])
def test_impossible_devices_are_refused(devices: str) -> None:
    with pytest.raises(ConfigError, match="--devices"):
        resolve_devices(RuntimeConfig(accelerator="cpu", devices=devices))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--accelerator gpu: no GPU"):
        resolve_devices(RuntimeConfig(accelerator="gpu"))


@pytest.mark.parametrize(
    ("num_gpus", "visible", "local_rank", "expected"),
    [(4, None, 1, "cuda:1"), (4, (2, 3), 1, "cuda:3"), (4, (1, 0), 0, "cuda:1"), (1, None, 3, "cuda:0")],
)
def test_the_gpu_of_a_process(
    num_gpus: int, visible: tuple[int, ...] | None, local_rank: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for processes of ours and of torchrun: both find these variables."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    place = {"RANK": local_rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank, "MASTER_ADDR": "here", "MASTER_PORT": 29500}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert own_device(Devices("cuda", 2, visible=visible)) == expected
