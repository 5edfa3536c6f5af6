"""Training on a GPU: compiled, deterministic, interrupted, out of memory, in a group of processes."""

import copy
import json
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from aligndet_cli.backbones import BackboneConfig
from aligndet_cli.config import RuntimeConfig
from aligndet_cli.finetune.views import Resolution, build_views
from aligndet_cli.processes.devices import Process
from aligndet_cli.training import batch_size, loop
from aligndet_cli.training.batch_size import largest_on_gpu
from aligndet_cli.training.learner import build_to_try
from aligndet_cli.training.placement import place, wrap
from aligndet_cli.training.settings import TrainingConfig, resolve_settings
from aligndet_cli.training.trial import GAPS_IN_FINETUNING, Trial
from helpers.commandline import CHAIN, RESOLUTION, aligndet, results_of
from helpers.gpu import ACCELERATOR, DEVICE, IS_CPU, PROCESS
from helpers.narrow import narrow_backbones, narrow_words
from helpers.small_detectors import SMALL

EVERY = ("--set", "training.log_every=1", "--set", "training.checkpoint.every_steps=2")
TRAIN = (*RESOLUTION, *ACCELERATOR, *EVERY, "--steps", "4", "--batch-size", "2", "--num-workers", "0")


@pytest.fixture(scope="module")
def proposals(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("training") / "workspace"
    aligndet("proposals", toy, "-w", workspace, *CHAIN["proposals"])
    return workspace


def train(workspace: Path, stage: str, detector: str, name: str, *more: str, code: int | None = 0) -> Path:
    start = ("--init", "scratch") if stage == "finetune" else ("--backbone-weights", "none")
    with narrow_backbones:
        words = (*narrow_words(detector), *TRAIN, *start, "--name", name, *more)
        aligndet(stage, "-w", workspace, *words, code=code)
    return workspace / stage / name


def losses_of(run: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in lines[0] if name.startswith("loss")}


@pytest.mark.timeout(3600 if IS_CPU else 600)  # g++ compiles for a CPU
@pytest.mark.parametrize("stage", ["pretrain-box", "finetune"])
def test_compiled_steps_are_the_same(proposals: Path, stage: str) -> None:
    eager = losses_of(train(proposals, stage, "retinanet", "eager"))
    compiled = losses_of(train(proposals, stage, "retinanet", "compiled", "--compile"))
    for name, losses in eager.items():
        assert compiled[name] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("detector", ["retinanet", "faster-rcnn", "detr"])
def test_bf16_steps(proposals: Path, detector: str) -> None:
    losses = losses_of(train(proposals, "finetune", detector, f"{detector}-bf16", "--precision", "bf16-mixed"))
    assert all(0 <= loss < 100 for of_name in losses.values() for loss in of_name)


@pytest.mark.parametrize("detector", ["retinanet", "faster-rcnn"])
def test_a_deterministic_run_is_repeated_and_continued(
    proposals: Path, detector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(proposals, "finetune", detector, f"{detector}-1", "--deterministic")
    step = loop.train_step

    def interrupted(learner: Any, samples: Any, number: int, *rest: Any) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(learner, samples, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        train(proposals, "finetune", detector, f"{detector}-2", "--deterministic", code=130)
    second = train(proposals, "finetune", detector, f"{detector}-2", "--deterministic")
    results = results_of(first), results_of(second)
    assert {"metrics.jsonl", "weights.pt"} <= results[0].keys()
    for name in ("metrics.jsonl", "weights.pt"):
        assert results[0][name] == results[1][name], name


def test_out_of_memory_is_one_line(proposals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *_: torch.empty(1 << 48, dtype=torch.uint8, device=DEVICE))
    words = ("finetune", "-w", proposals, *narrow_words("retinanet"), *TRAIN, "--init", "scratch", "--name", "greedy")
    with narrow_backbones:
        line = aligndet(*words, code=1).error_line()
    assert f"out of {'CPU' if IS_CPU else 'GPU'} memory: lower --batch-size" in line
    assert IS_CPU or "--precision bf16-mixed" in line


def test_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images of 800x1333 with 6 GB of a GPU; on a CPU memory is said to run out at four small ones."""
    resolution = Resolution("resize", (96,), 128, 1024) if IS_CPU else Resolution("resize", (800,), 1333, 1024)
    rates = SMALL["retinanet"].RECIPE.finetune
    settings = resolve_settings(
        TrainingConfig(batch_size=1, lr=1e-6), rates, num_images=100, seed=0, runtime=RuntimeConfig()
    )
    views = partial(build_views, SMALL["retinanet"], BackboneConfig(name="resnet18"), 3, resolution, 0)
    trial = Trial(
        build=partial(build_to_try, views, rates, settings, RuntimeConfig()),
        settings=settings,
        sizes_hw=resolution.worst_sizes(),
        num_boxes=7,
        num_classes=3,
        num_images=100,
        gaps=GAPS_IN_FINETUNING,
        pools_regions=False,
    )
    if IS_CPU:
        monkeypatch.setattr(batch_size, "train_step", _greedy(loop.train_step))
    else:
        torch.cuda.empty_cache()
        room = 6e9 + torch.cuda.memory_reserved(DEVICE)
        monkeypatch.setattr(batch_size, "USED_SHARE", room / torch.cuda.mem_get_info(DEVICE)[1])
    found = largest_on_gpu(trial, PROCESS)
    assert found == 3 if IS_CPU else 1 <= found <= 32
    if not IS_CPU:  # the limit is lifted again
        torch.empty(10 << 30, dtype=torch.uint8, device=DEVICE)


def _greedy(step: Any) -> Any:
    def call(learner: Any, samples: Any, *rest: Any) -> Any:
        if len(samples) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(learner, samples, *rest)

    return call


def test_batch_size_auto(proposals: Path) -> None:
    run = train(proposals, "pretrain-box", "retinanet", "auto", "--batch-size", "auto", "--steps", "1")
    settled = json.loads((run / "config.json").read_text())["training"]["batch_size"]
    assert settled == 16 if IS_CPU else 8 < settled <= 13  # the recipe's; on a GPU all images fit


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of one process."""
    dist.init_process_group("gloo" if IS_CPU else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_norms_and_gradients_of_a_group(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    plain = copy.deepcopy(model).to(DEVICE)
    several = Process(0, 2, str(DEVICE))
    place(model, several)
    assert isinstance(model[1], nn.SyncBatchNorm) != IS_CPU  # torch has none for CPUs
    wrapped = wrap(model, several)
    assert isinstance(wrapped, DistributedDataParallel)
    pixels = torch.randn(4, 3, 20, 24, device=DEVICE)
    for one in (plain, wrapped):
        one(pixels).square().mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    if not IS_CPU:
        check_own_way(plain[1], group)


def check_own_way(norm: nn.Module, group: dist.ProcessGroup) -> None:
    """In a group of one, a SyncBatchNorm takes the way of plain norms: this is its own."""
    hidden = torch.randn(4, 8, 10, 12, device=DEVICE).contiguous(memory_format=torch.channels_last)
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    statistics = [(torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE)) for _ in range(2)]
    synced: Tensor = SyncBatchNorm.apply(ours, norm.weight, norm.bias, *statistics[0], 1e-5, 0.1, group, 1)
    alone = nn.functional.batch_norm(theirs, *statistics[1], norm.weight, norm.bias, training=True, eps=1e-5)
    torch.testing.assert_close(synced, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics[0], statistics[1], rtol=1e-4, atol=1e-5)
    for output in (synced, alone):
        (output * hidden.roll(1, 0)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_a_run_that_a_launcher_started(proposals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by torchrun with one process: the group of processes is joined, by NCCL on a GPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    run = train(proposals, "pretrain-box", "fcos", "joined", "--steps", "2")
    assert losses_of(run)["loss_contrastive"] and not dist.is_initialized()
